import type { Texts } from "../../lib/i18n.svelte";

export const compare: Texts["compare"] = {
  title: "रन की तुलना",
  perMinute: "प्रशिक्षण के मिनटों से",
  heldOut: "अलग रखे डेटा का loss",
  heldOutChange: "अलग रखे loss में बदलाव",
  settings: "भिन्न सेटिंग",
  noDifference: "इन रन की सेटिंग समान हैं।",
  scores: "अलग रखा loss और स्कोर, मानक त्रुटि सहित",
  score: "स्कोर",
  images: "समान प्रॉम्प्ट",
  noImages: "कोई साझा प्रॉम्प्ट नहीं",
  noImagesHelp: "जहाँ समान प्रॉम्प्ट, आकार और सीड की सत्यापन छवियाँ हों, वहाँ रन साथ-साथ दिखते हैं।",
};
