// "Try it": one message is sent to two columns, which stream their answers. Each column has its own
// conversation.
const box = document.getElementById("try");
const composer = box.querySelector("[data-composer]");
const columns = [...box.querySelectorAll("[data-who]")].map((element) => ({
  element,
  who: element.dataset.who,
  messages: [],
}));
const getElement = (name) => box.querySelector(`[data-${name}]`);
let system = [];
let abortController = null;

function addMessage(column, role, content) {
  const chat = column.element.querySelector("[data-chat]");
  chat.querySelector(":scope > p.soft")?.remove();
  const turn = document.createElement("div");
  turn.className = `turn ${role}`;
  const who = document.createElement("span");
  who.className = "who";
  who.textContent = role;
  const text = document.createElement("span");
  text.textContent = content;
  turn.append(who, text);
  chat.append(turn);
  return text;
}

async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let remainder = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (remainder + value).split("\n\n");
    remainder = parts.pop();
    for (const part of parts)
      if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
  }
}

async function streamAnswer(column, settings, signal) {
  const speed = column.element.querySelector("[data-speed]");
  const text = addMessage(column, "assistant", "");
  let reasoning = "";
  let answerText = "";
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
    for await (const event of readEvents(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.snapml?.status) speed.textContent = `${event.snapml.status}…`;
      const { content, reasoning_content: newReasoning } = event.choices?.[0]?.delta ?? {};
      if (content || newReasoning) {
        reasoning += newReasoning ?? "";
        answerText += content ?? "";
        text.textContent = reasoning ? `Reasoning: ${reasoning}\n\n${answerText}` : answerText;
        speed.textContent = "answering…";
      }
      if (event.usage)
        speed.textContent =
          `${event.usage.completion_tokens} tokens, ` +
          `${event.snapml.tokens_per_second.toFixed(1)} tokens/s`;
    }
    column.messages.push({ role: "assistant", content: answerText });
  } catch (error) {
    if (error.name === "AbortError") speed.textContent = "stopped";
    else {
      speed.textContent = "";
      text.parentElement.className = "note bad";
      text.textContent = error.message;
    }
    column.messages.pop(); // the failed question is not part of the conversation
  }
}

composer.addEventListener("submit", async (event) => {
  event.preventDefault();
  const message = composer.elements.message.value.trim();
  if (!message || abortController) return;
  const settings = Object.fromEntries(
    ["temperature", "top_p", "max_tokens"].map((name) => [
      name,
      Number(composer.elements[name].value),
    ]),
  );
  composer.elements.message.value = "";
  abortController = new AbortController();
  getElement("send").disabled = true;
  getElement("stop").hidden = false;
  for (const column of columns) {
    column.messages.push({ role: "user", content: message });
    addMessage(column, "user", message);
  }
  await Promise.all(
    columns.map((column) => streamAnswer(column, settings, abortController.signal)),
  );
  abortController = null;
  getElement("send").disabled = false;
  getElement("stop").hidden = true;
});

composer.elements.message.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    composer.requestSubmit();
  }
});

function clear() {
  abortController?.abort();
  system = [];
  getElement("expected").hidden = true;
  for (const column of columns) {
    column.messages = [];
    column.element.querySelector("[data-chat]").replaceChildren();
    column.element.querySelector("[data-speed]").textContent = "";
  }
}

getElement("stop").addEventListener("click", () => abortController?.abort());
getElement("clear").addEventListener("click", clear);
getElement("random").addEventListener("click", async () => {
  const response = await fetch(box.dataset.heldOut, { headers: { Accept: "application/json" } });
  const row = await response.json();
  clear();
  if (!response.ok) {
    addMessage(columns[0], "system", row.error.message);
    return;
  }
  const last = row.messages.at(-1);
  system = row.messages.slice(0, -1);
  for (const column of columns)
    for (const message of system) addMessage(column, message.role, message.content);
  composer.elements.message.value = last?.content ?? "";
  box.querySelector("[data-expected-text]").textContent = row.expected;
  getElement("expected").hidden = false;
});
composer.inert = false;
