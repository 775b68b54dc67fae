import type { Texts } from "../../lib/i18n.svelte";

export const usage: Texts["usage"] = {
  title: "इस मशीन का भार",
  cpu: "CPU",
  memory: "उपयोग में मेमोरी",
  disk: "डिस्क से पढ़ना और लिखना",
  read: "पढ़ा",
  write: "लिखा",
  diskFree: "workspace की डिस्क पर खाली",
  load: "GPU का भार",
  temperature: "तापमान",
  power: "बिजली",
  minutes: "मिनट",
  none: "उस समय कुछ दर्ज नहीं हुआ। सर्वर तब दर्ज करता है जब कोई job चल रहा हो या यह पेज खुला हो।",
};
