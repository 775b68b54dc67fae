import type { Words } from "../../lib/i18n.svelte";

export const common: Words["common"] = {
  states: {
    draft: "ड्राफ़्ट",
    queued: "कतार में",
    starting: "शुरू हो रहा है",
    caching: "तैयारी चल रही है",
    running: "चल रहा है",
    stopping: "रुक रहा है",
    stopped: "रुका हुआ",
    failed: "विफल",
    done: "पूरा हुआ",
    lost: "बीच में टूट गया",
  },
  close: "बंद करें",
  cancel: "रद्द करें",
  save: "सहेजें",
  download: "डाउनलोड",
  loading: "लोड हो रहा है…",
  none: "कोई नहीं",
  yes: "हाँ",
  no: "नहीं",
  login: {
    title: "Token डालें",
    text: "इस सर्वर तक दूसरी मशीनों से पहुँचा जा सकता है, इसलिए यह पूछता है कि आप कौन हैं। Token शुरू होते समय इसके terminal में छपा था।",
    token: "Token",
    enter: "आगे बढ़ें",
  },
};
