"""What workers run: `deliver`, `poll`, `sweep`; `schedule` is the metronome, `worker` the process."""
