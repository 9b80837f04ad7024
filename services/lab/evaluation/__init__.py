"""Quality, measured: tasks with known answers, at every keep rate, beside dense and controls."""
