"use strict";
// The page is complete without this script. It adds the theme switch, the filter of the samples, and unfolding for print.
const theme = document.getElementById("theme");
theme.hidden = false;
theme.addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});

for (const bar of document.querySelectorAll(".filters")) {
  bar.hidden = false;
  const buttons = [...bar.querySelectorAll("button")];
  const choose = (chosen) => {
    for (const button of buttons) button.setAttribute("aria-pressed", String(button === chosen));
    for (const item of bar.parentElement.querySelectorAll(".item")) {
      item.hidden = chosen.dataset.filter !== "all" && item.dataset.outcome !== chosen.dataset.filter;
    }
  };
  for (const button of buttons) button.addEventListener("click", () => choose(button));
  choose(buttons[0]);
}

// The microscope: one line shows the numbers of the token under the pointer or the focus; arrow keys walk through a text.
for (const scope of document.querySelectorAll(".scope")) {
  const pick = scope.querySelector(".pick"), readout = scope.querySelector(".readout");
  pick.hidden = readout.hidden = false;
  const select = pick.querySelector("select"), texts = [...scope.querySelectorAll(".scoped")];
  const filter = () => {
    for (const text of texts) text.hidden = select.value !== "" && text.dataset.label !== select.value;
  };
  select.addEventListener("change", filter);
  filter(); // a browser may remember the choice
  for (const text of texts) text.querySelector("i").tabIndex = 0;
  const show = (event) => {
    const token = event.target.closest(".scoped i");
    if (token) readout.textContent = `“${token.textContent}”  ${token.title}`;
  };
  scope.addEventListener("mouseover", show);
  scope.addEventListener("focusin", show);
  scope.addEventListener("click", show);
  scope.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key], token = event.target.closest(".scoped i");
    if (!step || !token) return;
    const all = [...token.parentElement.querySelectorAll("i")], next = all[all.indexOf(token) + step];
    event.preventDefault();
    if (!next) return;
    token.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}

// What scrolls can be scrolled with the arrow keys; not every browser lets the focus into it by itself.
const reach = () => {
  for (const part of document.querySelectorAll(".scroll, pre")) {
    const scrolls = part.scrollWidth > part.clientWidth + 1 || part.scrollHeight > part.clientHeight + 1;
    if (scrolls) part.tabIndex = 0;
    else part.removeAttribute("tabindex");
  }
};
addEventListener("resize", reach);
document.addEventListener("toggle", reach, true);
reach();

// A link into a folded part opens it.
const reveal = () => {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  for (let part = target; part; part = part.parentElement) if (part.tagName === "DETAILS") part.open = true;
  if (target) target.scrollIntoView();
};
addEventListener("hashchange", reveal);
reveal();

let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const part of folded) part.open = true;
});
addEventListener("afterprint", () => { for (const part of folded) part.open = false; });
