"use strict";

// A picture of a few pixels is shown at a whole multiple of its size, so that it stays sharp.
function fit(image, room) {
  const width = image.naturalWidth;
  if (!width || width >= 160) return;
  image.classList.add("tiny");
  image.style.width = `${width * Math.max(1, Math.floor(room / width))}px`;
}

for (const image of document.querySelectorAll("img.picture")) {
  if (image.complete) fit(image, 192);
  else image.addEventListener("load", () => fit(image, 192));
}

// The gallery of paths. All text is set by textContent, never as markup.
(() => {
  const holder = document.getElementById("gallery-data");
  if (!holder) return;
  const { paths, questions, pictures } = JSON.parse(holder.textContent);
  const PAGE = 12;
  const form = document.getElementById("filters");
  const cards = document.getElementById("cards");
  const shown = document.getElementById("shown");
  const turn = document.getElementById("turn");
  const [back, next] = [document.getElementById("back"), document.getElementById("next")];
  let page = 0;
  let found = paths;

  const words = (path) => {
    const question = questions[path.question];
    return [path.key, path.answer, question.text, question.truth, ...path.steps.flat()]
      .join("\n").toLowerCase();
  };
  const index = paths.map(words);

  function element(tag, name, text) {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function data(tag, name, text) {
    const made = element(tag, name ? `${name} data` : "data", text);
    made.dir = "auto";
    return made;
  }

  function picture(place, question) {
    const uri = pictures[place];
    if (!uri) return element("div", "nopicture", "picture missing or broken");
    const image = element("img");
    image.src = uri;
    image.alt = `Picture of the question: ${question.text}`;
    return image;
  }

  const marks = { right: "✓ right", wrong: "✗ wrong", undecided: "? undecided", unjudged: "not judged" };

  const criteria = ["logic", "grounding", "completeness"];

  function card(path) {
    const question = questions[path.question];
    const article = element("article", "card");
    article.setAttribute("aria-label", `Path ${path.key}, ${path.outcome}`);
    const left = element("div", "pictures");
    left.append(...question.pictures.map((place) => picture(place, question)));
    const asked = data("p", "question", question.text);
    const body = element("div", "body");

    const steps = element("ol", "steps");
    path.steps.forEach(([title, content], number) => {
      const bad = path.bad.includes(number + 1);
      const item = element("li", bad ? "bad" : "");
      item.append(data("i", "", title), " ", data("span", "", content));
      if (bad) item.append(" ", element("span", "flag", "flagged"));
      steps.append(item);
    });
    body.append(steps);

    const final = element("p", "final");
    final.append("Answer ", data("b", "", path.answer || "none"), " ");
    final.append(element("span", `verdict ${path.outcome}`, marks[path.outcome]));
    body.append(final);

    const meta = element("p", "meta");
    const score = path.total === null
      ? (path.unscored ? `unscored: ${path.unscored}` : "not scored")
      : `score ${path.total} (${criteria.map((name) => `${name} ${path.marks[name] ?? "–"}`).join(", ")})`;
    const facts = [`truth ${question.truth}`, score, `${path.tokens} tokens`];
    if (path.outcome === "undecided" && path.detail) facts.push(path.detail);
    else if (path.rule) facts.push(`decided by ${path.rule}`);
    if (path.finish !== "summary") facts.push(path.finish === "step_cap" ? "stopped at the step limit" : path.finish);
    meta.append(data("span", "", facts.join(" · ")));
    body.append(meta);
    path.used.forEach((use) => body.append(element("span", "chip", use)));
    body.append(data("p", "card-key", path.key));
    article.append(left, asked, body);
    return article;
  }

  function filter() {
    const chosen = new FormData(form);
    const text = chosen.get("text").trim().toLowerCase();
    const [low, high] = ["low", "high"].map((name) => chosen.get(name));
    const scored = low !== "" || high !== "";
    found = paths.filter((path, number) =>
      (!chosen.get("outcome") || path.outcome === chosen.get("outcome"))
      && (!chosen.get("task") || questions[path.question].task === chosen.get("task").slice(1))
      && (!chosen.get("round") || path.round === chosen.get("round"))
      && (!scored || (path.total !== null && path.total >= Number(low || 0) && path.total <= Number(high || 100)))
      && (!text || index[number].includes(text)));
    page = 0;
    draw();
  }

  function draw() {
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    cards.replaceChildren(...found.slice(page * PAGE, (page + 1) * PAGE).map(card));
    if (!found.length) cards.append(element("p", "empty", "No path in the sample matches."));
    shown.textContent = `${found.length.toLocaleString("en")} of ${paths.length.toLocaleString("en")} paths`;
    turn.textContent = `page ${page + 1} of ${pages}`;
    back.disabled = page === 0;
    next.disabled = page >= pages - 1;
  }

  function move(by) {
    page += by;
    draw();
    document.getElementById("paths").scrollIntoView();
    cards.querySelector("article")?.setAttribute("tabindex", "-1");
    cards.querySelector("article")?.focus({ preventScroll: true });
  }

  const tasks = [...new Set(questions.map((question) => question.task))].sort();
  for (const task of tasks) {
    const option = element("option", "", task || "(none)");
    option.value = `=${task}`;
    form.elements.task.append(option);
  }
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter));
  back.addEventListener("click", () => move(-1));
  next.addEventListener("click", () => move(1));
  draw();
})();
