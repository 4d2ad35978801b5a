//! The table of replacements of `SentencePiece`: a tree in one array (a double array) whose leaves are places in a text.

/// Larger than any: the usual ones have 0.25 MB.
const MOST_BYTES: usize = 4 << 20;

/// The longest replacement in bytes, if every walk through the table stays inside of it.
pub(super) fn longest(base64: &str) -> Result<usize, String> {
    let bad = |what: &str| format!("its normalizer has a precompiled_charsmap that {what}");
    if base64.len() > MOST_BYTES {
        return Err(bad(&format!("has {} bytes, {MOST_BYTES} are possible", base64.len())));
    }
    let bytes = decode(base64).ok_or_else(|| bad("is no base64"))?;
    let split = || {
        let (size, rest) = bytes.split_first_chunk()?;
        rest.split_at_checked(u32::from_le_bytes(*size) as usize / 4 * 4)
    };
    let (tree, texts) = split().ok_or_else(|| bad("ends too early"))?;
    let texts = std::str::from_utf8(texts).map_err(|_| bad("is no UTF-8"))?;
    let units: Vec<u32> = tree.as_chunks().0.iter().map(|unit| u32::from_le_bytes(*unit)).collect();
    let Some(root) = units.first() else { return Err(bad("is empty")) };
    let (mut seen, mut longest) = (vec![false; units.len()], 0);
    let mut nodes = vec![offset(*root) as usize];
    while let Some(node) = nodes.pop() {
        for label in 1..=255 {
            let Some(unit) = units.get(node ^ label) else { return Err(bad("leads out of itself")) };
            if unit & (1 << 31 | 0xff) != label as u32 || std::mem::replace(&mut seen[node ^ label], true) {
                continue;
            }
            let next = node ^ label ^ offset(*unit) as usize;
            if unit >> 8 & 1 == 1 {
                let leaf = units.get(next).ok_or_else(|| bad("leads out of itself"))?;
                let text =
                    texts.get((leaf & !(1 << 31)) as usize..).ok_or_else(|| bad("leads out of its text"))?;
                longest = longest.max(text.find('\0').unwrap_or(text.len()));
            }
            nodes.push(next);
        }
    }
    Ok(longest)
}

/// Where the children of a node are, relative to it.
fn offset(unit: u32) -> u64 {
    u64::from(unit >> 10) << ((unit & 1 << 9) >> 6)
}

/// As strict as the crate, which panics where it is stricter.
fn decode(base64: &str) -> Option<Vec<u8>> {
    let text = base64.trim_end_matches('=').as_bytes();
    let padding = base64.len() - text.len();
    if !base64.len().is_multiple_of(4) || padding > 2 {
        return None;
    }
    let mut bytes = Vec::with_capacity(base64.len() / 4 * 3);
    for part in text.chunks(4) {
        let mut bits = 0_u32;
        for c in part {
            let value = match c {
                b'A'..=b'Z' => c - b'A',
                b'a'..=b'z' => c - b'a' + 26,
                b'0'..=b'9' => c - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => return None,
            };
            bits = bits << 6 | u32::from(value);
        }
        let [_, all @ ..] = (bits << (6 * (4 - part.len()))).to_be_bytes();
        let (used, rest) = all.split_at(part.len() - 1);
        if rest.iter().any(|byte| *byte != 0) {
            return None;
        }
        bytes.extend_from_slice(used);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_of_the_standard() {
        for (text, bytes) in [("", ""), ("Zg==", "f"), ("Zm8=", "fo"), ("Zm9v", "foo"), ("Zm9vYmE=", "fooba")]
        {
            assert_eq!(decode(text).unwrap(), bytes.as_bytes());
        }
        assert_eq!(decode("//79").unwrap(), [0xff, 0xfe, 0xfd]);
        for text in ["Z!==", "Zg", "Zg=", "Z===", "====", "Zh==", "Zm9=", "Zg==Zg=="] {
            assert_eq!(decode(text), None, "{text}");
        }
    }
}
