import type { Words } from "../../lib/i18n.svelte";

export const runs: Words["runs"] = {
  title: "Entrenamientos",
  start: "Nuevo entrenamiento",
  search: "Buscar por nombre",
  nothing: "Ningún entrenamiento tiene ese nombre.",
  progress: "Progreso",
  loss: "Pérdida",
  steps: (step, total) => `${step} de ${total} pasos`,
  left: (time) => `faltan ${time}`,
  empty: {
    title: "Aquí todavía no se ha entrenado nada",
    text: "Reúne de 10 a 50 imágenes de lo que el modelo debe aprender y prepara un entrenamiento. Verás lo que va a costar antes de empezar, y puedes ensayarlo en un minuto con el modelo diminuto incluido.",
    pictures: "1. Añadir imágenes",
    start: "2. Preparar un entrenamiento",
  },
  queue: {
    title: "Cola",
    paused: "La cola está en pausa: no arranca nada nuevo. Lo que está en marcha continúa.",
    pause: "Pausar la cola",
    go: "Reanudar la cola",
    continueOnError: "Seguir si un entrenamiento falla",
    rehearsal: "ensayo",
    earlier: (name) => `Empezar ${name} antes`,
    later: (name) => `Empezar ${name} después`,
    withdraw: "Retirar",
    empty: "No hay nada esperando.",
  },
};
