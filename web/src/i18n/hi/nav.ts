import type { Texts } from "../../lib/i18n.svelte";

export const nav: Texts["nav"] = {
  label: "पेज",
  skip: "सीधे सामग्री पर जाएँ",
  runs: "रन",
  newRun: "नया रन",
  datasets: "डेटासेट",
  system: "सिस्टम",
  language: "भाषा",
  theme: "थीम",
  themes: { system: "सिस्टम", light: "लाइट", dark: "डार्क" },
  connected: "लाइव",
  connecting: "कनेक्ट हो रहा है…",
  lost: "कनेक्शन नहीं है",
  settings: "सेटिंग",
};
