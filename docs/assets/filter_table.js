// A field above each long table that hides the rows that lack what is typed. Words are joined by "and".
(() => {
  const LONG = 30; // rows

  const attach = (table) => {
    const rows = [...table.tBodies[0].rows];
    if (rows.length < LONG) return;
    const texts = rows.map((row) => row.textContent.toLowerCase());

    const bar = document.createElement("div");
    bar.className = "table-filter";
    const field = document.createElement("input");
    field.type = "search";
    field.placeholder = "Filter rows: a name, an outcome, several words";
    field.setAttribute("aria-label", "Filter the rows of the table below");
    const count = document.createElement("output");
    bar.append(field, count);

    const show = () => {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      rows.forEach((row, index) => {
        row.hidden = !words.every((word) => texts[index].includes(word));
        shown += !row.hidden;
      });
      count.textContent = `${shown} of ${rows.length} rows`;
    };
    field.addEventListener("input", show);
    show();
    (table.closest(".md-typeset__scrollwrap") ?? table).before(bar);
  };

  document.addEventListener("DOMContentLoaded", () => {
    document.querySelectorAll("article table").forEach(attach);
  });
})();
