"use strict";
// The page reads without this; it adds what moves: a slider between the float model's images and an entry's.
document.documentElement.classList.add("js");
for (const gallery of document.querySelectorAll(".gallery")) {
  const reference = gallery.querySelector(".reference img");
  for (const pair of gallery.querySelectorAll(".pair")) {
    const stage = pair.querySelector(".stage"), range = pair.querySelector("input[type=range]");
    const over = reference.cloneNode();
    over.classList.add("over");
    over.alt = "";
    over.draggable = stage.firstElementChild.draggable = false;
    stage.append(over);
    const cut = () => stage.style.setProperty("--cut", range.value + "%");
    const follow = (event) => {
      const box = stage.getBoundingClientRect();
      range.value = 100 * (event.clientX - box.left) / box.width;
      cut();
    };
    range.addEventListener("input", cut);
    stage.addEventListener("pointerdown", (event) => { stage.setPointerCapture(event.pointerId); follow(event); });
    stage.addEventListener("pointermove", (event) => { if (event.buttons) follow(event); });
    cut();
  }
}
