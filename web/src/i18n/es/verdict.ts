import type { Texts } from "../../lib/i18n.svelte";

export const verdict: Texts["verdict"] = {
  titles: {
    learning: "Sigue aprendiendo",
    flat: "Ya no mejora",
    notLearning: "No aprende",
    risen: "No aprende",
    overfitting: "Sobreajuste",
    overfittingSaved: "Sobreajuste",
    unknown: "Faltan mediciones",
  },
  texts: {
    learning: "La pérdida de evaluación cambió {change} desde el paso {since} (medido en el paso {step}). Más pasos deberían ayudar (max_train_steps).",
    flat: "Del paso {since} al paso {step} la pérdida de evaluación cambió {change}. Los pasos posteriores al {since} no tienen un efecto medible: entrena esa cantidad de pasos, o detén el entrenamiento con early_stopping.",
    notLearning: "La pérdida de evaluación cambió {change} desde el paso 0 (medido en el paso {step}). Si las imágenes tampoco cambian, sube learning_rate (`simpletuner tune` encuentra un valor) o revisa las descripciones.",
    risen: "La pérdida de evaluación subió {change} desde el paso 0 (medido en el paso {step}). Baja learning_rate (`simpletuner tune` encuentra un valor).",
    overfitting: "La pérdida de evaluación subió {change} del paso {since} al paso {step}. El paso con la pérdida más baja, {best}, no tiene checkpoint: entrena {best} pasos. Más imágenes, un learning_rate menor o un lora_rank menor mueven ese punto.",
    overfittingSaved: "La pérdida de evaluación subió {change} del paso {since} al paso {step}. Usa {checkpoint}, que tiene la pérdida más baja. Más imágenes, un learning_rate menor o un lora_rank menor mueven ese punto.",
    unknown: "En el paso {step} hay muy pocas mediciones de la pérdida de evaluación para decir si el entrenamiento sigue aprendiendo. Un eval_steps_interval menor da más.",
  },
  paired: "Comparación por pares en {samples} {samples|imagen reservada|imágenes reservadas}; ± es un error estándar.",
  resumes: {
    title: "Reanudaciones",
    time: "Hora",
    checkpoint: "Checkpoint",
    step: "Desde el paso",
    repeated: "Pasos repetidos",
  },
};
