"""The engine behind HTTP: any OpenAI-compatible server, running already or started here."""
