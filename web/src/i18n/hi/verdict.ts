import type { Texts } from "../../lib/i18n.svelte";

export const verdict: Texts["verdict"] = {
  titles: {
    learning: "अभी भी सीख रहा है",
    flat: "अब सुधार नहीं हो रहा",
    notLearning: "सीख नहीं रहा",
    risen: "सीख नहीं रहा",
    overfitting: "Overfitting",
    overfittingSaved: "Overfitting",
    unknown: "माप बहुत कम हैं",
  },
  texts: {
    learning: "Step {since} से held-out loss {change} बदला (step {step} तक)। और steps से फ़ायदा होना चाहिए (max_train_steps)।",
    flat: "Step {since} से step {step} तक held-out loss {change} बदला। Step {since} के बाद के steps का कोई मापने योग्य असर नहीं है: उतने ही steps प्रशिक्षण दें, या early_stopping से रोकें।",
    notLearning: "Step 0 से held-out loss {change} बदला (step {step} तक)। अगर इमेज भी नहीं बदलतीं, तो learning_rate बढ़ाएँ (`simpletuner tune` सही मान खोजता है) या कैप्शन जाँचें।",
    risen: "Step 0 से held-out loss {change} बढ़ा (step {step} तक)। learning_rate घटाएँ (`simpletuner tune` सही मान खोजता है)।",
    overfitting: "Step {since} से step {step} तक held-out loss {change} बढ़ा। सबसे कम loss वाले step {best} का कोई checkpoint नहीं है: {best} steps प्रशिक्षण दें। ज़्यादा इमेज, कम learning_rate या कम lora_rank से यह बिंदु बदलता है।",
    overfittingSaved: "Step {since} से step {step} तक held-out loss {change} बढ़ा। {checkpoint} इस्तेमाल करें, जिसका loss सबसे कम है। ज़्यादा इमेज, कम learning_rate या कम lora_rank से यह बिंदु बदलता है।",
    unknown: "Step {step} पर held-out loss के माप इतने कम हैं कि यह नहीं कहा जा सकता कि रन अभी भी सीख रहा है। कम eval_steps_interval से ज़्यादा माप मिलते हैं।",
  },
  paired: "{samples} held-out {samples|इमेज|इमेज} पर जोड़ों में तुलना; ± एक standard error है।",
  resumes: {
    title: "फिर से शुरू होने का इतिहास",
    time: "समय",
    checkpoint: "Checkpoint",
    step: "किस step से",
    repeated: "दोहराए गए steps",
  },
};
