// What is said, in the language that was chosen, and numbers as people read them.

import { STRINGS } from "./strings.js";

const LANGUAGES = { en: "en", zh: "zh-CN" };
let language = (navigator.language || "en").toLowerCase().startsWith("zh") ? "zh" : "en";

// The string of a key, with values for its {names}.
export function t(key, values = {}) {
  const pair = STRINGS[key];
  const text = pair ? pair[language === "zh" ? 1 : 0] : key;
  return text.replace(/\{(\w+)\}/g, (all, name) => (name in values ? String(values[name]) : all));
}

// Choose a language for the whole page: elements with data-t say their string, with data-label carry it.
export function speak(chosen = language) {
  language = chosen;
  document.documentElement.lang = LANGUAGES[language];
  document.title = `Netweight · ${t("title")}`;
  for (const element of document.querySelectorAll("[data-t]")) element.textContent = t(element.dataset.t);
  for (const element of document.querySelectorAll("[data-label]")) element.setAttribute("aria-label", t(element.dataset.label));
  for (const button of document.querySelectorAll("[data-language]")) {
    button.setAttribute("aria-pressed", String(button.dataset.language === language));
  }
}

// A problem in words. The server speaks English; its detail is kept beside a translation.
export function problem(refused) {
  const key = `problem:${refused.code}`;
  if (!(key in STRINGS)) return refused.message || String(refused);
  return t(key, { detail: refused.message });
}

const format = (options) => (value) => new Intl.NumberFormat(LANGUAGES[language], options).format(value).replace("-", "−");
const missing = (say) => (value) => (value === null || value === undefined || Number.isNaN(value) ? "–" : say(value));

export const count = missing(format({ maximumFractionDigits: 0 }));
export const significant = missing(format({ maximumSignificantDigits: 3 }));
export const fixed = (value, digits) => missing(format({ minimumFractionDigits: digits, maximumFractionDigits: digits }))(value);
export const percent = (share, digits = 1) => (Number.isNaN(share) ? "–" : `${fixed(100 * share, digits)}\u00a0%`);
export const signed = (value, digits) => (value > 0 ? "+" : "") + fixed(value, digits);

// Bytes in kB, MB or GB of 1,000.
export function size(bytes) {
  for (const [unit, scale] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (bytes >= scale) return `${significant(bytes / scale)}\u00a0${unit}`;
  }
  return missing((n) => `${count(n)} B`)(bytes);
}
