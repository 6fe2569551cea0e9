// The reader: every token of an answer coloured by its KL; hover, focus or tap shows its numbers.

if (page.answers?.length) {
  const [low, high] = page.heat; // nats at the ends of the colour scale, which is logarithmic
  const root = document.getElementById("reader");
  const box = document.getElementById("tokens");
  const pick = document.getElementById("answer");
  const inspector = document.getElementById("inspector");
  let current = 0;
  let marks = [];
  let focused = 0;

  const heat = (kl) =>
    kl > 0 ? Math.min(1, Math.max(0, Math.log(kl / low) / Math.log(high / low))) : 0;
  const chance = (logp) => (logp === null ? "–" : `${number(100 * Math.exp(logp))}%`);

  function column(name) {
    const { tokens } = page.answers[current];
    return (i) => tokens[name]?.[i] ?? null;
  }

  function open(index) {
    current = Math.min(page.answers.length - 1, Math.max(0, index));
    const { prompt, tokens, about } = page.answers[current];
    const [text, kl, rock, rank, weight] = ["text", "kl", "rock", "rank", "weight"].map(column);
    pick.value = String(current);
    document.getElementById("answer-about").textContent = about;
    document.getElementById("answer-prompt").textContent = prompt;
    const parts = [];
    marks = tokens.text.map((_, i) => {
      const said = `${text(i)}, KL ${number(kl(i))} nats${rock(i) ? `, rock, rank ${number(rank(i))}` : ""}`;
      const mark = make("span", text(i), { class: "t", role: "option", tabindex: -1, "aria-label": said });
      mark.setAttribute("aria-selected", "false");
      mark.style.setProperty("--k", heat(kl(i)).toFixed(3));
      mark.classList.toggle("rock", Boolean(rock(i)));
      mark.classList.toggle("gated", weight(i) !== null && weight(i) < 1);
      mark.dataset.index = i;
      parts.push(mark);
      for (const char of text(i)) if (char === "⏎") parts.push(document.createElement("br"));
      return mark;
    });
    box.replaceChildren(...parts);
    document.getElementById("previous").disabled = current === 0;
    document.getElementById("next").disabled = current === page.answers.length - 1;
    select(0, false);
  }

  function inspect(i) {
    const get = (name) => column(name)(i);
    const title = make("h3", `${get("text")} `);
    title.append(make("span", `id ${get("id")}, ${i + 1} of ${marks.length}`));
    const parts = [title, make("p", `KL ${number(get("kl"))} nats`)];
    if (get("logp") !== null || get("entropy") !== null) {
      const table = make("table");
      const head = make("tr");
      head.append(make("td"), make("th", "student", { scope: "col" }), make("th", "teacher", { scope: "col" }));
      table.append(head);
      for (const [name, ...values] of [
        ["log p", number(get("logp")), number(get("teacher_logp"))],
        ["p", chance(get("logp")), chance(get("teacher_logp"))],
        ["entropy", number(get("entropy")), number(get("teacher_entropy"))],
      ]) {
        const row = make("tr");
        row.append(make("th", name, { scope: "row" }), ...values.map((value) => make("td", value)));
        table.append(row);
      }
      parts.push(table);
    }
    const list = make("dl");
    for (const [name, label] of [["score", "Rock Score"], ["rank", "rank"], ["weight", "gate weight"]]) {
      if (get(name) !== null) list.append(make("dt", label), make("dd", number(get(name))));
    }
    if (list.children.length) parts.push(list);
    inspector.replaceChildren(...parts);
  }

  function select(i, isFocus = true) {
    if (!marks.length) return inspector.replaceChildren();
    marks[focused]?.setAttribute("tabindex", "-1");
    marks[focused]?.setAttribute("aria-selected", "false");
    focused = Math.min(marks.length - 1, Math.max(0, i));
    marks[focused].setAttribute("tabindex", "0");
    marks[focused].setAttribute("aria-selected", "true");
    if (isFocus) marks[focused].focus();
    inspect(focused);
  }

  /** The token of the next line above (-1) or below (1) that stands nearest to the focused one. */
  function acrossLines(direction) {
    const from = marks[focused].getBoundingClientRect();
    const places = marks.map((mark, i) => ({ i, at: mark.getBoundingClientRect() }));
    const beyond = places.filter(({ at }) => direction * (at.top - from.top) > from.height / 2);
    if (!beyond.length) return focused;
    const top = beyond[direction > 0 ? 0 : beyond.length - 1].at.top;
    const line = beyond.filter(({ at }) => Math.abs(at.top - top) < from.height / 2);
    const distance = ({ at }) => Math.abs(at.left - from.left);
    return line.reduce((best, place) => (distance(place) < distance(best) ? place : best)).i;
  }

  const moves = {
    ArrowRight: () => focused + 1,
    ArrowLeft: () => focused - 1,
    ArrowDown: () => acrossLines(1),
    ArrowUp: () => acrossLines(-1),
    Home: () => 0,
    End: () => marks.length - 1,
  };

  box.addEventListener("keydown", (event) => {
    if (!moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    select(moves[event.key]());
  });
  root.addEventListener("keydown", (event) => {
    const step = { j: 1, k: -1 }[event.key];
    if (!step || event.target === pick || event.ctrlKey || event.metaKey || event.altKey) return;
    const isReading = box.contains(document.activeElement);
    open(current + step);
    if (isReading) select(0);
  });
  const indexOf = (event) => event.target.closest(".t")?.dataset.index;
  box.addEventListener("pointerover", (event) => indexOf(event) && inspect(Number(indexOf(event))));
  box.addEventListener("pointerleave", () => marks.length && inspect(focused));
  box.addEventListener("click", (event) => indexOf(event) && select(Number(indexOf(event))));
  box.addEventListener("focusin", (event) => indexOf(event) && select(Number(indexOf(event)), false));
  pick.addEventListener("change", () => open(Number(pick.value)));
  document.getElementById("previous").addEventListener("click", () => open(current - 1));
  document.getElementById("next").addEventListener("click", () => open(current + 1));
  pick.replaceChildren(
    ...page.answers.map((answer, i) => make("option", `${i + 1}. ${answer.name}`, { value: i })),
  );
  open(0);
}
