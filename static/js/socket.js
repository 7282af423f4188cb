// One socket for one run, with one cursor. Reload, sleep, lost Wi-Fi and a restarted server are
// handled alike: reconnect and send the number of the last event. The events that follow have no
// gap and no duplicates.
const FINAL_CLOSE_REASONS = {
  4401: "You are signed out. Sign in again.",
  4403: "You no longer have access to this run.",
  4429: "Too many open pages. Close some of them.",
};

export class LiveRun extends EventTarget {
  constructor(address, run, points, cursor) {
    super();
    this.address = address;
    this.run = run;
    this.points = points;
    this.cursor = cursor;
    this.retryDelay = 250;
    addEventListener("online", () => this.reconnectNow());
    document.addEventListener("visibilitychange", () => document.hidden || this.reconnectNow());
    this.connect();
  }

  connect() {
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    this.socket = new WebSocket(`${scheme}://${location.host}${this.address}`);
    this.socket.onopen = () => {
      this.retryDelay = 250;
      this.emitEvent("open");
      this.subscribe();
    };
    this.socket.onmessage = (message) => this.handleMessage(JSON.parse(message.data));
    this.socket.onclose = (event) => this.handleClose(event.code);
  }

  subscribe() {
    this.send({ type: "sub", run: this.run, cursor: this.cursor, points: this.points });
  }

  handleMessage(message) {
    // Also of a frame that does not fit: the server sends the next one only after this.
    this.send({ type: "ack", run: this.run, seq: message.upto ?? message.last });
    if (message.type === "delta" && message.first !== this.cursor + 1) {
      this.cursor = 0; // events are missing: request a new snapshot
      this.subscribe();
      return;
    }
    this.cursor = message.type === "snap" ? message.upto : message.last;
    this.emitEvent(message.type, message);
  }

  handleClose(code) {
    if (FINAL_CLOSE_REASONS[code]) {
      this.emitEvent("refused", { reason: FINAL_CLOSE_REASONS[code] });
      return;
    }
    this.emitEvent("closed");
    this.timer = setTimeout(() => this.connect(), this.retryDelay * (0.75 + Math.random() / 2));
    this.retryDelay = Math.min(this.retryDelay * 2, 10_000);
  }

  reconnectNow() {
    if (this.socket.readyState !== WebSocket.CLOSED) return;
    clearTimeout(this.timer);
    this.connect();
  }

  requestSnapshot() {
    this.cursor = 0;
    if (this.socket.readyState === WebSocket.OPEN) this.subscribe();
  }

  send(message) {
    this.socket.send(JSON.stringify(message));
  }

  emitEvent(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}
