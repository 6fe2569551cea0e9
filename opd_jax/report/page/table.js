// The table of types: sorted by a click on a heading, filtered by what is typed.

if (page.types) {
  const { columns, rows } = page.types;
  const head = document.querySelector("#types thead tr");
  const body = document.querySelector("#types tbody");
  const search = document.getElementById("types-search");
  const only = document.getElementById("types-rocks");
  const said = document.getElementById("types-said");
  const at = Object.fromEntries(columns.map((column, i) => [column.name, i]));
  const percent = (value) => (value === null ? "–" : `${number(100 * value)}%`);
  const kinds = { text: String, token: String, share: percent, number, flag: (value) => (value ? "yes" : "no") };
  const isText = (column) => column.kind === "text" || column.kind === "token";

  const lines = rows.map((values) => {
    const line = make("tr", "", values[at.member] ? { class: "rock" } : {});
    columns.forEach((column, i) => {
      const cell = make("td", kinds[column.kind](values[i]));
      if (isText(column)) cell.className = column.kind;
      if (column.place) cell.classList.add(column.place);
      line.append(cell);
    });
    const token = values[at.token].toLowerCase();
    const words = `${values[at.token_id]} ${values[at.group]}`.toLowerCase();
    return { values, line, token, words };
  });

  const headings = columns.map((column, i) => {
    const heading = make("th", "", { scope: "col", title: column.title });
    if (isText(column)) heading.className = "text";
    if (column.place) heading.classList.add(column.place);
    const button = make("button", column.label, { type: "button" });
    button.addEventListener("click", () => sortBy(i));
    heading.append(button);
    return heading;
  });
  head.replaceChildren(...headings);

  function sortBy(i) {
    const was = headings[i].getAttribute("aria-sort");
    // Largest first, as one looks for much of something; ranks and words from the first.
    const first = isText(columns[i]) || columns[i].name === "rank" ? "ascending" : "descending";
    const next = was ? (was === "ascending" ? "descending" : "ascending") : first;
    headings.forEach((heading) => heading.removeAttribute("aria-sort"));
    headings[i].setAttribute("aria-sort", next);
    const sign = next === "ascending" ? 1 : -1;
    lines.sort(({ values: { [i]: a } }, { values: { [i]: b } }) => {
      if (a === null || b === null) return (a === null) - (b === null); // what is not measured, last
      return sign * (typeof a === "string" ? a.localeCompare(b) : a - b);
    });
    body.replaceChildren(...lines.map(({ line }) => line));
  }

  function filter() {
    const typed = search.value.toLowerCase();
    const signs = typed.replaceAll(" ", "␣"); // in a token a space is shown as its sign, in a kind not
    const isFound = ({ token, words }) =>
      token.includes(signs) || (typed.trim() && words.includes(typed.trim()));
    let shown = 0;
    for (const row of lines) {
      const { values, line } = row;
      line.hidden = !isFound(row) || (only.checked && !values[at.member]);
      shown += !line.hidden;
    }
    said.textContent = `${number(shown)} of ${number(lines.length)} types`;
  }

  search.addEventListener("input", filter);
  only.addEventListener("change", filter);
  sortBy(at.rank);
  filter();
}
