export const errors = {
  unreachable: "The server does not answer. Is it still running? A training goes on without it.",
  loginNeeded: "This server asks for its token.",
  refused: (status: number) => `The server refused (${status}).`,
};
