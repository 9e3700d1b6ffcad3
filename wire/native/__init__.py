"""The native engine's memory as data: what each op holds, and where in one arena every array of a step lies."""
