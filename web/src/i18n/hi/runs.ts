import type { Texts } from "../../lib/i18n.svelte";

export const runs: Texts["runs"] = {
  title: "रन",
  start: "नया रन",
  search: "नाम से खोजें",
  nothing: "इस नाम का कोई रन नहीं है।",
  progress: "प्रगति",
  loss: "Loss",
  steps: (step, total) => `${total} में से ${step} steps`,
  left: (time) => `${time} बाकी`,
  empty: {
    title: "अभी कोई रन नहीं है",
    text: "मॉडल को जो सीखना है उसकी 10 से 50 इमेज जोड़ें, फिर एक रन तैयार करें। शुरू होने से पहले दिखता है कि कितनी मेमोरी और कितना समय लगेगा, और साथ मिले छोटे मॉडल पर dry run में लगभग एक मिनट लगता है।",
    images: "1. इमेज जोड़ें",
    start: "2. रन तैयार करें",
  },
  queue: {
    title: "कतार",
    paused: "कतार रुकी हुई है: कोई नया रन शुरू नहीं होगा। चल रहे रन चलते रहेंगे।",
    pause: "कतार रोकें",
    resume: "कतार फिर से शुरू करें",
    continueOnError: "कोई रन विफल हो तो भी जारी रखें",
    dryRun: "dry run",
    gpus: (count) => `${count} GPU`,
    allGpus: "सभी GPU",
    earlier: (name) => `${name} को ऊपर ले जाएँ`,
    later: (name) => `${name} को नीचे ले जाएँ`,
    remove: "हटाएँ",
    empty: "कतार खाली है।",
  },
};
