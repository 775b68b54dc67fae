import type { Words } from "../../lib/i18n.svelte";

export const nav: Words["nav"] = {
  label: "पेज",
  skip: "सीधे सामग्री पर जाएँ",
  runs: "Runs",
  newRun: "नया run",
  datasets: "Datasets",
  system: "सिस्टम",
  language: "भाषा",
  theme: "रंग",
  themes: { system: "सिस्टम जैसा", light: "हल्का", dark: "गहरा" },
  connected: "लाइव",
  connecting: "जुड़ रहा है…",
  lost: "कनेक्शन नहीं है",
};
