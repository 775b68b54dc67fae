import type { Texts } from "../../lib/i18n.svelte";

export const common: Texts["common"] = {
  states: {
    draft: "ड्राफ़्ट",
    queued: "कतार में",
    starting: "शुरू हो रहा है",
    caching: "कैश बन रहा है",
    running: "चल रहा है",
    stopping: "रुक रहा है",
    stopped: "रुका हुआ",
    failed: "विफल",
    done: "पूरा हुआ",
    lost: "बीच में बंद हुआ",
  },
  close: "बंद करें",
  cancel: "रद्द करें",
  download: "डाउनलोड करें",
  loading: "लोड हो रहा है…",
  login: {
    title: "लॉग इन करें",
    text: "दूसरी मशीनें इस सर्वर तक पहुँच सकती हैं, इसलिए token ज़रूरी है। Token सर्वर शुरू होते समय उसके terminal में दिखाया गया था।",
    token: "Token",
    enter: "लॉग इन करें",
  },
  pager: { label: "पृष्ठ", previous: "पिछला", next: "अगला", range: "{total} में से {from} से {to}" },
  trash: {
    deleted: "{name} ट्रैश में गया।",
    restored: "{name} वापस लाया गया।",
    several: "{n} वस्तुएँ",
    undo: "पूर्ववत करें",
  },
  preview: "जो इमेज बन रही है, उसकी मोटी झलक",
};
