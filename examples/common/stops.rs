//! Texts that end what is written: held back while they may be coming.

/// The text so far, the end of which may be the beginning of a stop.
pub(crate) struct Held<'a> {
    stops: &'a [String],
    /// Not shown yet.
    pending: String,
    /// Bytes that were shown.
    shown: usize,
    stopped: bool,
}

impl<'a> Held<'a> {
    pub(crate) fn new(stops: &'a [String]) -> Self {
        Self { stops, pending: String::new(), shown: 0, stopped: false }
    }

    /// More of the text; what of it can be shown.
    pub(crate) fn push(&mut self, piece: &str) -> String {
        self.pending.push_str(piece);
        let stop = self.stops.iter().filter_map(|stop| self.pending.find(stop.as_str())).min();
        self.stopped = stop.is_some();
        let sure = stop.unwrap_or_else(|| self.pending.len() - self.doubtful());
        let shown = self.pending[..sure].to_string();
        self.pending.drain(..sure);
        self.shown += sure;
        shown
    }

    /// Bytes at the end that a stop may begin with.
    fn doubtful(&self) -> usize {
        let longest = |stop: &String| {
            let ends = stop.char_indices().map(|(at, _)| at).rev();
            ends.into_iter().find(|&at| self.pending.ends_with(&stop[..at])).unwrap_or(0)
        };
        self.stops.iter().map(longest).max().unwrap_or(0)
    }

    /// Whether a stop was written.
    pub(crate) fn stopped(&self) -> bool {
        self.stopped
    }

    /// Bytes of the text so far.
    pub(crate) fn len(&self) -> usize {
        self.shown + self.pending.len()
    }

    /// What was held back, now that nothing follows; nothing of a stop.
    pub(crate) fn rest(self) -> String {
        if self.stopped { String::new() } else { self.pending }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let stops: Vec<_> = stops.iter().map(ToString::to_string).collect();
        let mut held = Held::new(&stops);
        let mut shown = Vec::new();
        for piece in pieces {
            shown.push(held.push(piece));
            if held.stopped() {
                return (shown, true);
            }
        }
        shown.push(held.rest());
        (shown, false)
    }

    #[test]
    fn a_stop_is_found_across_pieces_and_never_shown() {
        assert_eq!(run(&["\nUser:"], &["Yes.", "\n", "Us", "er", ": no"]).0.concat(), "Yes.");
        assert_eq!(run(&["END"], &["aEN", "EN", "D"]), (vec!["a".into(), "EN".into(), String::new()], true));
        assert_eq!(run(&["é!"], &["caf", "é", "!"]).0.concat(), "caf");
        // The one that comes first, whatever their order.
        assert_eq!(run(&["later", "so"], &["not so later"]).0.concat(), "not ");
    }

    #[test]
    fn what_only_looked_like_a_stop_is_shown() {
        assert_eq!(run(&["END"], &["E", "N", "d"]).0.concat(), "ENd");
        assert_eq!(run(&["END"], &["the EN"]), (vec!["the ".into(), "EN".into()], false));
        assert_eq!(run(&[], &["a", "b"]).0, ["a", "b", ""]);
    }
}
