import type { Texts } from "../../lib/i18n.svelte";

export const errors: Texts["errors"] = {
  unreachable: "सर्वर जवाब नहीं दे रहा। जाँचें कि वह चल रहा है। प्रशिक्षण उसके बिना भी चलता रहता है।",
  loginNeeded: "इस सर्वर के लिए token ज़रूरी है।",
  refused: (status) => `सर्वर ने अनुरोध अस्वीकार किया (${status})।`,
};
