import type { Texts } from "../../lib/i18n.svelte";

export const common: Texts["common"] = {
  states: {
    draft: "Borrador",
    queued: "En cola",
    starting: "Arrancando",
    caching: "Preparando cachés",
    running: "En marcha",
    stopping: "Deteniéndose",
    stopped: "Detenido",
    failed: "Fallido",
    done: "Terminado",
    lost: "Interrumpido",
  },
  close: "Cerrar",
  cancel: "Cancelar",
  download: "Descargar",
  loading: "Cargando…",
  login: {
    title: "Iniciar sesión",
    text: "Otros equipos pueden acceder a este servidor, por eso requiere un token. El token se mostró en el terminal del servidor al arrancar.",
    token: "Token",
    enter: "Iniciar sesión",
  },
  pager: { label: "Páginas", previous: "Anterior", next: "Siguiente", range: "{from} a {to} de {total}" },
  trash: {
    deleted: "{name} se movió a la papelera.",
    restored: "{name} se restauró.",
    several: "{n} elementos",
    undo: "Deshacer",
  },
  preview: "Vista previa aproximada de lo que se está generando",
};
