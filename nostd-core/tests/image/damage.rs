//! Images that are not what was written end in an error or in text, never in a panic or an endless loop.

use crate::{
    model::{CONFIG, Words, image_bytes, next, say},
    vocabulary::tables,
};
use candle_sparse_core::image::{Error, Header, Image};
use crc::{CRC_32_ISO_HDLC, Crc};

fn whole() -> Vec<u8> {
    image_bytes(&CONFIG, &tables().to_bytes())
}

/// Makes the checksum right again, as somebody with bad intent would.
fn seal(bytes: &mut [u8]) {
    if bytes.len() > size_of::<Header>() {
        let sum = Crc::<u32>::new(&CRC_32_ISO_HDLC).checksum(&bytes[16..]);
        bytes[12..16].copy_from_slice(&sum.to_le_bytes());
    }
}

fn open(bytes: &[u8]) -> Result<(), Error> {
    Image::open(Words::new(bytes).bytes()).map(|_| ())
}

/// Bytes of header and table.
fn head(bytes: &[u8]) -> usize {
    let tensors = u32::from_le_bytes(bytes[20..24].try_into().unwrap());
    32 + 32 * tensors as usize
}

#[test]
fn a_whole_image_is_read_back() {
    let bytes = whole();
    let words = Words::new(&bytes);
    let image = Image::open(words.bytes()).unwrap();
    assert_eq!(*image.config(), CONFIG);
    let text = say(&bytes).unwrap();
    assert!(text.starts_with("an aé") && text.len() > 5, "{text:?}");
    // What stands behind an image, such as erased flash, is not looked at.
    assert_eq!(say(&[&bytes[..], &[0xff; 100]].concat()).unwrap(), text);
}

#[test]
fn every_flipped_byte_of_header_and_tables_is_an_error() {
    let bytes = whole();
    for at in 0..head(&bytes) {
        for flip in [1, 0x80, 0xff] {
            let mut bad = bytes.clone();
            bad[at] ^= flip;
            assert!(open(&bad).is_err(), "byte {at} ^ {flip}");
        }
    }
}

/// With the right checksum the checks behind it are alone: an error or text.
#[test]
fn every_flipped_byte_of_header_tables_and_tokenizer_under_a_right_checksum_ends() {
    let bytes = whole();
    // Configuration, settings and tokenizer are first.
    let end = head(&bytes) + 4 * (24 + 12) + tables().to_bytes().len() + 64;
    let mut texts = 0;
    for at in (0..end.min(bytes.len())).filter(|at| !(12..16).contains(at)) {
        let mut bad = bytes.clone();
        bad[at] ^= 1 << (at % 8);
        seal(&mut bad);
        texts += usize::from(say(&bad).is_ok());
    }
    // Some change nothing that matters, such as a letter of a token.
    assert!(texts > 0 && texts < end, "{texts} of {end}");
}

#[test]
fn ten_thousand_random_truncations_and_flips_end() {
    let bytes = whole();
    let mut seed = 1;
    let (mut errors, mut texts) = (0, 0);
    for round in 0..10_000 {
        let mut bad = bytes.clone();
        if round % 4 == 0 {
            bad.truncate(next(&mut seed) as usize % bytes.len());
        }
        for _ in 0..1 + next(&mut seed) % 4 {
            let at = next(&mut seed) as usize;
            // Half of them where structures are.
            let range = if round % 2 == 0 { bad.len() } else { head(&bytes).min(bad.len()) };
            if range > 0 {
                bad[at % range] ^= next(&mut seed) as u8;
            }
        }
        if round % 3 != 0 {
            seal(&mut bad);
        }
        match say(&bad) {
            Ok(_) => texts += 1,
            Err(_) => errors += 1,
        }
    }
    assert!(errors > 1000 && texts > 1000, "{errors} errors, {texts} texts");
}

#[test]
fn errors_say_what_is_wrong() {
    let bytes = whole();
    let changed = |at: usize, byte: u8| {
        let mut bad = bytes.clone();
        bad[at] = byte;
        open(&bad).unwrap_err()
    };
    assert_eq!(open(&[]), Err(Error::NotAnImage));
    assert_eq!(changed(0, b'X'), Error::NotAnImage);
    assert_eq!(changed(8, 9), Error::Version(9));
    let expected = bytes.len() as u32;
    assert_eq!(open(&bytes[..100]), Err(Error::Truncated { expected, got: 100 }));
    assert!(matches!(changed(bytes.len() - 1, 0xAA), Error::Checksum { .. }));
    let words = Words::new(&[&[0; 4], &bytes[..]].concat());
    assert_eq!(Image::open(&words.bytes()[4..]).unwrap_err(), Error::Misaligned);
}
