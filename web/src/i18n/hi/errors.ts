import type { Words } from "../../lib/i18n.svelte";

export const errors: Words["errors"] = {
  unreachable: "सर्वर जवाब नहीं दे रहा। क्या वह चल रहा है? Training उसके बिना भी चलती रहती है।",
  loginNeeded: "यह सर्वर अपना token माँगता है।",
  refused: (status) => `सर्वर ने मना कर दिया (${status})।`,
};
