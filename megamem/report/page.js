"use strict";
// Everything shown was computed before; this only chooses what is seen.
(() => {
  const all = (query) => [...document.querySelectorAll(query)];

  // What a part of a picture says, at once rather than after a second.
  const tip = document.getElementById("tip");
  document.addEventListener("mousemove", (event) => {
    const part = event.target.closest("svg rect, svg path, svg circle, svg g");
    const title = part && part.querySelector(":scope > title");
    tip.style.display = title ? "block" : "none";
    if (!title) return;
    tip.textContent = title.textContent;
    tip.style.left = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = event.clientY + 16 + "px";
  });

  // One picture per rank, of which one is seen.
  for (const picks of all(".picks")) {
    const pictures = [...picks.nextElementSibling.children];
    const show = (chosen) => {
      pictures.forEach((picture, index) => picture.classList.toggle("hidden", index !== chosen));
      [...picks.children].forEach((button, index) => button.setAttribute("aria-pressed", String(index === chosen)));
    };
    [...picks.children].forEach((button, index) => button.addEventListener("click", () => show(index)));
    show(Number(picks.dataset.first || 0));
  }

  // What if: the cell under both sliders.
  const data = document.getElementById("what-if-data");
  if (!data) return;
  const grid = JSON.parse(data.textContent);
  const sequence = document.getElementById("sequence"), host = document.getElementById("host");
  const show = () => {
    const i = Number(sequence.value), j = Number(host.value), cell = grid.cells[i][j];
    document.getElementById("sequence-value").textContent = grid.seq_lengths[i];
    document.getElementById("host-value").textContent = grid.host_memories[j];
    for (const [name, content] of Object.entries(cell)) {
      const place = document.getElementById("what-if-" + name);
      if (place) place.textContent = content;
    }
    document.getElementById("what-if-verdict").classList.toggle("warning", !cell.fits);
    for (const place of all(".grid td")) {
      place.classList.toggle("here", Number(place.dataset.i) === i && Number(place.dataset.j) === j);
    }
  };
  for (const slider of [sequence, host]) slider.addEventListener("input", show);
  for (const place of all(".grid td")) {
    place.addEventListener("click", () => {
      sequence.value = place.dataset.i;
      host.value = place.dataset.j;
      show();
    });
  }
  show();
})();
