// A strip's scales are buttons: choosing one shows it large; left and right move along the strip.
const show = (button) => {
  const figure = button.closest("figure");
  const big = figure.querySelector(".nf-big");
  const steps = [...figure.querySelectorAll("button.nf-step")];
  if (big.tagName !== "IMG") return;
  big.dataset.alt = big.dataset.alt || big.alt;
  big.src = button.querySelector("img").src;
  const last = steps.indexOf(button) === steps.length - 1;
  big.alt = last ? big.dataset.alt : `${big.dataset.alt}, ${button.getAttribute("aria-label")}`;
  steps.forEach((step) => step.setAttribute("aria-pressed", String(step === button)));
};
element.addEventListener("click", (event) => {
  const button = event.target.closest("button.nf-step");
  if (button) show(button);
});
element.addEventListener("keydown", (event) => {
  const button = event.target.closest("button.nf-step");
  const way = { ArrowLeft: "previousElementSibling", ArrowRight: "nextElementSibling" }[event.key];
  const next = button && way && button[way];
  if (!next || next.tagName !== "BUTTON") return;
  event.preventDefault();
  next.focus();
  show(next);
});
// Films play by themselves, but for those who asked their system for less motion.
const play = (figure) => {
  const button = figure.querySelector(".nf-play");
  const steps = [...figure.querySelectorAll("button.nf-step")];
  let at = 0;
  button.textContent = "Pause";
  figure.timer = setInterval(() => {
    if (!figure.isConnected) return clearInterval(figure.timer);
    show(steps[at]);
    at = (at + 1) % steps.length;
  }, 1000 / Number(figure.dataset.speed));
};
const pause = (figure) => {
  clearInterval(figure.timer);
  figure.timer = undefined;
  figure.querySelector(".nf-play").textContent = "Play";
};
element.addEventListener("click", (event) => {
  const button = event.target.closest(".nf-play");
  const figure = event.target.closest(".nf-film");
  if (button) figure.timer ? pause(figure) : play(figure);
  else if (figure && event.target.closest("button.nf-step")) pause(figure);
});
watch("value", () => {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  element.querySelectorAll(".nf-film").forEach((figure) => (still ? pause(figure) : play(figure)));
});
element.addEventListener("input", (event) => {
  const compare = event.target.closest(".nf-compare");
  if (compare) compare.style.setProperty("--at", `${event.target.value}%`);
});
