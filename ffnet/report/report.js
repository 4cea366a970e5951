"use strict";
// Turn the headings of sortable tables into buttons; without this script the tables stay in their original order.
for (const table of document.querySelectorAll("table.sortable")) {
  for (const heading of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const key = (row) => row.cells[heading.cellIndex].dataset.value ?? row.cells[heading.cellIndex].textContent;
      const compare = (first, second) => {
        if (first === "" || second === "") return (first === "") - (second === ""); // missing values stay last
        return sign * (isNaN(first) || isNaN(second) ? first.localeCompare(second) : first - second);
      };
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => compare(key(a), key(b))));
    });
  }
}
// Lay the second picture of a pair over the first, up to where the slider is; without this script they are side by side.
for (const wipe of document.querySelectorAll(".wipe")) {
  const slider = wipe.querySelector("input");
  const show = () => wipe.style.setProperty("--at", `${slider.value}%`);
  slider.addEventListener("input", show);
  slider.hidden = false;
  wipe.classList.add("on");
  show();
}
for (const command of document.querySelectorAll(".command")) {
  const button = document.createElement("button");
  button.textContent = "Copy";
  command.after(button);
  button.addEventListener("click", () => {
    getSelection().selectAllChildren(command);
    button.textContent = document.execCommand("copy") ? "Copied" : "Press Ctrl-C";
  });
}
