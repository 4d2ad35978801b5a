//! Nothing but a place for benches whose dependencies nobody else shall build.
