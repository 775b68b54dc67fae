import type { Words } from "../../lib/i18n.svelte";

export const runs: Words["runs"] = {
  title: "Runs",
  start: "नया run",
  search: "नाम से खोजें",
  nothing: "इस नाम का कोई run नहीं है।",
  progress: "प्रगति",
  loss: "Loss",
  steps: (step, total) => `${total} में से ${step} steps`,
  left: (time) => `${time} बाकी`,
  empty: {
    title: "यहाँ अभी तक कुछ भी train नहीं हुआ है",
    text: "Model को जो सिखाना है उसकी 10 से 50 तस्वीरें जोड़ें, फिर एक run तैयार करें। शुरू होने से पहले ही दिख जाता है कि उसमें कितनी memory लगेगी, और साथ में मिले छोटे model पर एक मिनट में उसका अभ्यास भी हो सकता है।",
    pictures: "1. तस्वीरें जोड़ें",
    start: "2. Run तैयार करें",
  },
  queue: {
    title: "कतार",
    paused: "कतार रुकी हुई है: कोई नया run शुरू नहीं होगा। जो चल रहा है वह चलता रहेगा।",
    pause: "कतार रोकें",
    go: "कतार फिर चलाएँ",
    continueOnError: "कोई run विफल हो तो भी आगे बढ़ें",
    rehearsal: "अभ्यास",
    earlier: (name) => `${name} को पहले शुरू करें`,
    later: (name) => `${name} को बाद में शुरू करें`,
    withdraw: "हटाएँ",
    empty: "कतार में कुछ नहीं है।",
  },
};
