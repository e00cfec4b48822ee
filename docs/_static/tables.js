// Name each cell after its column, for the cards that site.css makes of tables on a phone.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("article table")) {
    const heads = [...table.querySelectorAll("thead th")].map((head) => head.textContent.trim());
    if (heads.length < 3) continue;
    for (const cell of table.querySelectorAll("tbody td")) {
      if (cell.textContent.trim()) cell.dataset.label = heads[cell.cellIndex];
    }
  }
});
