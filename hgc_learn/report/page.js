"use strict";
// Says what is under the pointer, or at the step that the arrow keys have chosen.
const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
const rounded = (number) => number.toLocaleString("en", { maximumSignificantDigits: 3 });
const names = { R: "runs", F: "filled in", D: "not needed" };

function words(strip, step) {
  const { name, part, full, macs, states, fills } = data.strips[strip];
  const half = data.half[step] ? ", guided half only" : "";
  const lines = [name, `step ${step} (timestep ${Number(data.timesteps[step].toPrecision(6))}${half})`];
  if (states) lines.push(names[states[step]] + (fills[step] && `: ${fills[step]}`));
  const where = part === name || part === "all" ? "" : ` in ${part}`;
  const [unit, letter] = full < 1e9 ? [1e6, "M"] : [1e9, "G"];
  if (full) lines.push(`${rounded(macs[step] / unit)} of ${rounded(full / unit)} ${letter}MACs${where}`);
  return lines.join("\n");
}

function show(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(x + 12, innerWidth - width - 8))}px`;
  tip.style.top = `${y + 16 + height > innerHeight ? Math.max(8, y - height - 12) : y + 16}px`;
}

const hide = () => { tip.hidden = true; };

for (const strip of document.querySelectorAll("[data-strip]")) {
  const index = Number(strip.dataset.strip), last = data.timesteps.length - 1;
  let chosen = 0;
  strip.addEventListener("pointermove", (event) => {
    const { left, width } = strip.getBoundingClientRect();
    const step = Math.floor(((event.clientX - left) / width) * (last + 1));
    show(words(index, Math.max(0, Math.min(last, step))), event.clientX, event.clientY);
  });
  const showChosen = () => {
    const { left, top, width } = strip.getBoundingClientRect();
    show(words(index, chosen), left + ((chosen + 0.5) / (last + 1)) * width, top);
  };
  strip.addEventListener("focus", () => { if (strip.matches(":focus-visible")) showChosen(); });
  strip.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    chosen = Math.max(0, Math.min(last, chosen + move));
    showChosen();
  });
  strip.addEventListener("pointerleave", hide);
  strip.addEventListener("blur", hide);
}

for (const mark of document.querySelectorAll("[data-tip]")) {
  mark.addEventListener("pointermove", (event) => show(mark.dataset.tip, event.clientX, event.clientY));
  mark.addEventListener("pointerleave", hide);
  mark.addEventListener("blur", hide);
  mark.addEventListener("focus", () => {
    const { left, bottom } = mark.getBoundingClientRect();
    show(mark.dataset.tip, left, bottom);
  });
}
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
addEventListener("scroll", hide, { passive: true });
