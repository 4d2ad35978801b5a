//! Texts that end what is written: held back while they may be coming.

/// The text so far, the end of which may be the beginning of a stop text.
///
/// A stop text may lie across pieces. What is shown never holds a stop text, nor what comes behind it; where several are
/// written the one that begins first counts.
///
/// ```
/// use candle_sparse_models::tokenizer::StopTexts;
///
/// let mut text = StopTexts::new(["\nUser:".to_string()]);
/// assert_eq!(text.push("Yes.\nUs"), "Yes.");
/// assert_eq!(text.push("er: no"), "");
/// assert!(text.stopped());
/// assert_eq!(text.rest(), "");
///
/// // It only looked like one.
/// let mut text = StopTexts::new(["\nUser:".to_string()]);
/// assert_eq!(text.push("Yes.\n") + &text.push("Use") + &text.rest(), "Yes.\nUse");
/// ```
#[derive(Clone, Debug, Default)]
pub struct StopTexts {
    stops: Vec<String>,
    /// Not shown yet.
    pending: String,
    /// Bytes that were shown.
    shown: usize,
    stopped: bool,
}

impl StopTexts {
    /// No text yet; empty stop texts are left out.
    #[must_use]
    pub fn new(stops: impl IntoIterator<Item = String>) -> Self {
        Self { stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(), ..Self::default() }
    }

    /// More of the text; what of it can be shown. Nothing once a stop text was written.
    #[must_use]
    pub fn push(&mut self, piece: &str) -> String {
        if self.stopped {
            return String::new();
        }
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

    /// Whether a stop text was written.
    #[must_use]
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// Bytes of the text so far, what is held back among them.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shown + self.pending.len()
    }

    /// Whether there is no text yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What was held back, now that nothing follows; nothing of a stop text.
    #[must_use]
    pub fn rest(self) -> String {
        if self.stopped { String::new() } else { self.pending }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let mut text = StopTexts::new(stops.iter().map(ToString::to_string));
        let mut shown = Vec::new();
        for piece in pieces {
            shown.push(text.push(piece));
            if text.stopped() {
                return (shown, true);
            }
        }
        shown.push(text.rest());
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

    #[test]
    fn nothing_follows_a_stop() {
        let mut text = StopTexts::new(["so".to_string(), String::new()]);
        assert_eq!(text.push("not so"), "not ");
        assert_eq!((text.push(" later"), text.len(), text.stopped()), (String::new(), 6, true));
    }
}
