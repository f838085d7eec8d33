// A chat with a model, or with two side by side. This page is a client of /v1 like any other.

const $ = (id) => document.getElementById(id);
const KEY = "vlmq-key";
const MODELS = ["vlmq-model", "vlmq-beside"];

/** What the server said no with, in its own words. */
class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server cannot be reached. Is it running?");
  }
  if (response.ok) return response;
  if (response.status === 401) {
    throw new Refused(401, key ? "The server does not know this API key." : "This server wants an API key.");
  }
  const body = await response.json().catch(() => null);
  throw new Refused(response.status, body?.error?.message ?? `The server answered ${response.status}.`);
}

/** The JSON values of a stream of server-sent events, until its [DONE]. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Refused(0, "The connection was lost before the answer had ended.");
    text += value;
    const frames = text.split("\n\n");
    text = frames.pop();
    for (const frame of frames) {
      const data = frame.split("\n").find((line) => line.startsWith("data: "))?.slice(6);
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

function element(name, className, text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}

/** One model's side of the conversation. */
class Column {
  constructor(model) {
    this.model = model;
    this.turns = [];
    this.root = element("section", "column");
    this.root.setAttribute("aria-label", `Chat with ${model}`);
    this.log = element("div");
    this.log.setAttribute("role", "log");
    this.root.append(element("h2", "", model), this.log);
    this.running = null;
  }

  get isBusy() {
    return this.running !== null;
  }

  show(turn) {
    const asked = element("div", "asked");
    for (const picture of turn.pictures) {
      const image = element("img");
      image.src = picture.url;
      image.alt = picture.name;
      asked.append(image);
    }
    asked.append(turn.text);
    this.log.append(asked);
  }

  async ask(turn) {
    this.show(turn);
    await this.answer(turn);
  }

  async answer(turn) {
    const shown = element("div", "answered", "…");
    this.log.append(shown);
    this.scroll();
    this.running = new AbortController();
    const answer = { text: "", reason: null, usage: null, begun: performance.now(), first: null };
    try {
      await this.read(turn, answer, shown);
      this.turns.push({ ...turn, answer: answer.text });
      shown.append(element("p", "told", told(answer)));
    } catch (error) {
      this.failed(turn, answer, shown, error);
    } finally {
      this.running = null;
      this.scroll();
    }
  }

  async read(turn, answer, shown) {
    const response = await request("v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(this.body(turn)),
      signal: this.running.signal,
    });
    for await (const event of events(response)) {
      if (event.error) throw new Refused(0, event.error.message);
      const choice = event.choices?.[0];
      answer.usage = event.usage ?? answer.usage;
      answer.reason = choice?.finish_reason ?? answer.reason;
      if (!choice?.delta?.content) continue;
      answer.first ??= performance.now();
      answer.text += choice.delta.content;
      shown.textContent = answer.text;
      this.scroll();
    }
    if (!answer.text) shown.textContent = "(an empty answer)";
  }

  failed(turn, answer, shown, error) {
    if (error.name === "AbortError") {
      shown.append(element("p", "told", "stopped"));
      // What was read is part of the conversation; a question without an answer is not.
      if (answer.text) this.turns.push({ ...turn, answer: answer.text });
      return;
    }
    if (!answer.text) shown.textContent = "";
    shown.append(element("p", "failed", error.message));
    if (error.status === 401) askForKey(error.message);
    const again = element("button", "", "Try again");
    again.type = "button";
    again.addEventListener("click", () => {
      if (this.isBusy) return;
      shown.remove();
      during(this.answer(turn));
    });
    shown.append(again);
  }

  stop() {
    this.running?.abort();
  }

  body(turn) {
    const system = $("system").value.trim();
    const messages = system ? [{ role: "system", content: system }] : [];
    for (const past of this.turns) {
      messages.push(asMessage(past), { role: "assistant", content: past.answer });
    }
    messages.push(asMessage(turn));
    const body = { model: this.model, messages, stream: true, stream_options: { include_usage: true } };
    if ($("max-tokens").value) body.max_completion_tokens = Number($("max-tokens").value);
    if ($("temperature").value) body.temperature = Number($("temperature").value);
    return body;
  }

  scroll() {
    this.root.scrollTop = this.root.scrollHeight;
    // On a narrow screen columns stand below each other and do not scroll by themselves.
    if (columns.length === 1) $("columns").scrollTop = $("columns").scrollHeight;
  }
}

function asMessage(turn) {
  const pictures = turn.pictures.map((picture) => ({
    type: "image_url",
    image_url: { url: picture.url, detail: turn.detail },
  }));
  return { role: "user", content: [...pictures, { type: "text", text: turn.text }] };
}

function told(answer) {
  const seconds = (from, to) => `${((to - from) / 1000).toFixed(2)} s`;
  const words = [];
  if (answer.first) words.push(`first word after ${seconds(answer.begun, answer.first)}`);
  words.push(`all after ${seconds(answer.begun, performance.now())}`);
  if (answer.usage) words.push(`${answer.usage.prompt_tokens} tokens in, ${answer.usage.completion_tokens} out`);
  if (answer.reason === "length") words.push("cut off: no more tokens were allowed");
  return words.join(" · ");
}

// --- the models ---

let columns = [];
let troubled = false;

function notice(text) {
  troubled = false;
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

/** What is wrong with the models; it goes away with its cause, and takes no other notice along. */
function trouble(text) {
  if (text || troubled) notice(text);
  troubled = Boolean(text);
}

async function loadModels(asking = true) {
  let found;
  try {
    found = (await (await request("v1/models")).json()).data.map((model) => model.id);
  } catch (error) {
    trouble(error.message);
    if (error.status === 401 && asking) askForKey(error.message);
    return;
  }
  trouble(found.length ? "" : "This server has no models yet: link one with vlmq models link, or vlmq models pull.");
  const selects = [$("model"), $("beside")];
  selects.forEach((select, index) => {
    const wanted = select.value || sessionStorage.getItem(MODELS[index]) || "";
    const options = found.map((name) => new Option(name, name));
    if (index === 1) options.unshift(new Option("no other", ""));
    select.replaceChildren(...options);
    if (wanted === "" || found.includes(wanted)) select.value = wanted || options[0]?.value || "";
  });
  arrange();
}

/** Columns for the models that are chosen; a model that stays keeps its conversation. */
function arrange() {
  const chosen = [...new Set([$("model").value, $("beside").value])].filter(Boolean);
  columns.filter((column) => !chosen.includes(column.model)).forEach((column) => column.stop());
  columns = chosen.map((name) => columns.find((column) => column.model === name) ?? new Column(name));
  $("columns").replaceChildren(...columns.map((column) => column.root));
  columns.forEach((column) => column.scroll());
  sessionStorage.setItem(MODELS[0], $("model").value);
  sessionStorage.setItem(MODELS[1], $("beside").value);
  showBusy();
}

// --- the question ---

let pictures = [];

function addFiles(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/")) {
      notice(`${file.name} is no picture.`);
      continue;
    }
    const reader = new FileReader();
    reader.addEventListener("load", () => {
      pictures.push({ name: file.name, url: reader.result });
      showPictures();
    });
    reader.addEventListener("error", () => notice(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  }
}

function showPictures() {
  $("pictures").replaceChildren(
    ...pictures.map((picture) => {
      const item = element("li");
      const image = element("img");
      image.src = picture.url;
      image.alt = "";
      const remove = element("button", "", "Remove");
      remove.type = "button";
      remove.addEventListener("click", () => {
        pictures = pictures.filter((other) => other !== picture);
        showPictures();
      });
      item.append(image, element("span", "", picture.name), remove);
      return item;
    }),
  );
}

function send() {
  const text = $("text").value.trim();
  if (!columns.length || columns.some((column) => column.isBusy)) return;
  if (!text) {
    $("text").focus();
    return;
  }
  const turn = { text, pictures, detail: $("detail").value };
  $("text").value = "";
  pictures = [];
  showPictures();
  notice("");
  during(...columns.map((column) => column.ask(turn)));
}

/** Show that answers are on their way until they have ended. */
async function during(...answers) {
  showBusy();
  await Promise.all(answers.map((answer) => answer.finally(showBusy)));
}

function showBusy() {
  const busy = columns.some((column) => column.isBusy);
  $("send").disabled = busy || !columns.length;
  $("stop").hidden = !busy;
}

// --- the key ---

function askForKey(why) {
  if ($("key-dialog").open) return;
  $("key-why").textContent = why;
  $("key").value = "";
  $("key-dialog").showModal();
}

$("key-dialog").addEventListener("close", () => {
  if ($("key-dialog").returnValue !== "use") return;
  $("key-dialog").returnValue = "";
  const given = $("key").value.trim();
  if (given) sessionStorage.setItem(KEY, given);
  else sessionStorage.removeItem(KEY);
  $("key").value = "";
  loadModels();
});
$("key-cancel").addEventListener("click", () => $("key-dialog").close("cancel"));
$("key-open").addEventListener("click", () => askForKey("The key to send with every request; empty for none."));

// --- what people do ---

$("model").addEventListener("change", arrange);
$("beside").addEventListener("change", arrange);
$("anew").addEventListener("click", () => {
  columns.forEach((column) => column.stop());
  columns = [];
  arrange();
  $("text").focus();
});
$("choose").addEventListener("click", () => $("files").click());
$("files").addEventListener("change", () => {
  addFiles($("files").files);
  $("files").value = "";
});
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("stop").addEventListener("click", () => columns.forEach((column) => column.stop()));
$("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) {
    event.preventDefault();
    addFiles(event.clipboardData.files);
  }
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  $("ask").classList.add("over");
});
document.addEventListener("dragleave", () => $("ask").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("ask").classList.remove("over");
  addFiles(event.dataTransfer.files);
});
// Models come and go while a page is open. Who cancelled the dialog is not asked at every return.
window.addEventListener("focus", () => loadModels(false));

loadModels();
$("text").focus();
