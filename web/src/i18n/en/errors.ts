export const errors = {
  unreachable: "The server does not respond. Check that it is running. Trainings continue without it.",
  loginNeeded: "This server requires a token.",
  refused: (status: number) => `The server rejected the request (${status}).`,
};
