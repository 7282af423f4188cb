// "Try it": one message, two columns, both streaming. Each column keeps a conversation of its own.
const box = document.getElementById("try");
const composer = box.querySelector("[data-composer]");
const columns = [...box.querySelectorAll("[data-who]")].map((element) => ({
  element,
  who: element.dataset.who,
  messages: [],
}));
const button = (name) => box.querySelector(`[data-${name}]`);
let system = [];
let stopping = null;

function bubble(column, role, words) {
  const chat = column.element.querySelector("[data-chat]");
  chat.querySelector(":scope > p.soft")?.remove();
  const turn = document.createElement("div");
  turn.className = `turn ${role}`;
  const who = document.createElement("span");
  who.className = "who";
  who.textContent = role;
  const text = document.createElement("span");
  text.textContent = words;
  turn.append(who, text);
  chat.append(turn);
  return text;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts)
      if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
  }
}

async function answer(column, settings, signal) {
  const speed = column.element.querySelector("[data-speed]");
  const text = bubble(column, "assistant", "");
  let said = "";
  speed.textContent = "waiting…";
  try {
    const response = await fetch(box.dataset.try, {
      method: "POST",
      headers: {
        "Content-Type": "application/json",
        "X-CSRFToken": box.dataset.csrf,
        Accept: "application/json, text/event-stream",
      },
      body: JSON.stringify({
        who: column.who,
        messages: [...system, ...column.messages],
        ...settings,
      }),
      signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.snapml?.status) speed.textContent = `${event.snapml.status}…`;
      const piece = event.choices?.[0]?.delta?.content;
      if (piece) {
        said += piece;
        text.textContent = said;
        speed.textContent = "answering…";
      }
      if (event.usage)
        speed.textContent =
          `${event.usage.completion_tokens} tokens, ` +
          `${event.snapml.tokens_per_second.toFixed(1)} tokens/s`;
    }
    column.messages.push({ role: "assistant", content: said });
  } catch (error) {
    if (error.name === "AbortError") speed.textContent = "stopped";
    else {
      speed.textContent = "";
      text.parentElement.className = "note bad";
      text.textContent = error.message;
    }
    column.messages.pop(); // the question is asked again, not answered twice
  }
}

composer.addEventListener("submit", async (event) => {
  event.preventDefault();
  const message = composer.elements.message.value.trim();
  if (!message || stopping) return;
  const settings = Object.fromEntries(
    ["temperature", "top_p", "max_tokens"].map((name) => [
      name,
      Number(composer.elements[name].value),
    ]),
  );
  composer.elements.message.value = "";
  stopping = new AbortController();
  button("send").disabled = true;
  button("stop").hidden = false;
  for (const column of columns) {
    column.messages.push({ role: "user", content: message });
    bubble(column, "user", message);
  }
  await Promise.all(columns.map((column) => answer(column, settings, stopping.signal)));
  stopping = null;
  button("send").disabled = false;
  button("stop").hidden = true;
});

composer.elements.message.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    composer.requestSubmit();
  }
});

function clear() {
  stopping?.abort();
  system = [];
  button("expected").hidden = true;
  for (const column of columns) {
    column.messages = [];
    column.element.querySelector("[data-chat]").replaceChildren();
    column.element.querySelector("[data-speed]").textContent = "";
  }
}

button("stop").addEventListener("click", () => stopping?.abort());
button("clear").addEventListener("click", clear);
button("random").addEventListener("click", async () => {
  const response = await fetch(box.dataset.heldout, { headers: { Accept: "application/json" } });
  const row = await response.json();
  clear();
  if (!response.ok) {
    bubble(columns[0], "system", row.error.message);
    return;
  }
  const last = row.messages.at(-1);
  system = row.messages.slice(0, -1);
  for (const column of columns)
    for (const message of system) bubble(column, message.role, message.content);
  composer.elements.message.value = last?.content ?? "";
  box.querySelector("[data-expected-text]").textContent = row.expected;
  button("expected").hidden = false;
});
composer.inert = false;
