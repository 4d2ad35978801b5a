//! The program itself, without anything of a machine.

use candle_sparse_core::{
    ActivationGroup, KvCache, Scalar, Scratch,
    forward::forward,
    image::{Image, empty_layer},
    sampler::Sampler,
    tokenizer::TextStream,
};
use core::fmt::{self, Write};
use crc::{CRC_32_ISO_HDLC, Crc};

const PROMPT: &str = "Once upon a time there was a";
const TOKENS: usize = 64;
/// Tokens of the prompt and behind it at most.
const ROOM: usize = 128;
/// Blocks that a model may have.
const LAYERS: usize = 12;

static CHECKSUM: Crc<u32> = Crc::<u32>::new(&CRC_32_ISO_HDLC);

/// What a machine gives.
pub(crate) struct Machine<'a, W> {
    pub(crate) out: W,
    /// All the memory beside the stack.
    pub(crate) memory: Memory<'a>,
    /// Instructions since some moment, where the machine counts them.
    pub(crate) instructions: fn() -> Option<u64>,
}

/// Memory that is given away from front to back.
pub(crate) struct Memory<'a> {
    pub(crate) rest: &'a mut [ActivationGroup],
}

impl<'a> Memory<'a> {
    /// `n` elements, all zero.
    fn take<T: bytemuck::Pod>(&mut self, n: usize) -> Result<&'a mut [T], &'static str> {
        let units = (n * size_of::<T>()).div_ceil(size_of::<ActivationGroup>());
        let rest = core::mem::take(&mut self.rest);
        let (head, tail) =
            rest.split_at_mut_checked(units).ok_or("the model needs more memory than there is")?;
        self.rest = tail;
        Ok(&mut bytemuck::cast_slice_mut(head)[..n])
    }
}

/// Everything that can go wrong, in words.
pub(crate) struct Failure;

impl From<fmt::Error> for Failure {
    fn from(_: fmt::Error) -> Self {
        Self
    }
}

/// Runs the image.
pub(crate) fn run<W: Write>(mut machine: Machine<'_, W>, image: &[u8]) -> Result<(), Failure> {
    macro_rules! or_say {
        ($result:expr) => {
            match $result {
                Ok(value) => value,
                Err(e) => {
                    writeln!(machine.out, "error: {e}")?;
                    return Err(Failure);
                }
            }
        };
    }
    let image = or_say!(Image::open(image));
    let tokenizer = or_say!(image.tokenizer());
    let c = image.config();
    let before = machine.memory.rest.len();
    let mut layers = [empty_layer(); LAYERS];
    let layers = layers.get_mut(..c.num_hidden_layers).ok_or("the model has too many blocks");
    let model = or_say!(image.model(or_say!(layers)));
    let (memory, positions) = (&mut machine.memory, image.settings().positions);
    let cache = or_say!(memory.take(KvCache::words(&model, positions)));
    let mut cache = or_say!(KvCache::new(&model, cache));
    let data = or_say!(memory.take(Scratch::elements(&model, positions)));
    let groups = or_say!(memory.take(Scratch::groups(c)));
    let mut scratch = or_say!(Scratch::new(&model, positions, data, groups));
    let logits: &mut [f32] = or_say!(memory.take(c.vocab_size));
    let [ids, ranks]: [&mut [u32]; 2] = [or_say!(memory.take(ROOM)), or_say!(memory.take(ROOM))];
    let prompt = or_say!(tokenizer.encode_prompt(PROMPT, ids, ranks));

    let (mut digest, mut text) = (CHECKSUM.digest(), TextStream::default());
    let (mut first, mut last) = (None, None);
    write!(machine.out, "text   ")?;
    for position in 0..prompt + TOKENS {
        let token = ids[position];
        text.push(&tokenizer, token, &mut OneLine(&mut machine.out))?;
        if position + 1 == prompt + TOKENS {
            break;
        }
        first = if position == prompt { (machine.instructions)() } else { first };
        let (at, out) = ((token as usize, position), Some(&mut *logits));
        or_say!(forward(&Scalar, &model, at, &mut cache, &mut scratch, out, &mut || false));
        digest.update(bytemuck::cast_slice(logits));
        if position + 1 >= prompt {
            ids[position + 1] = or_say!(Sampler::Greedy.sample(logits, || 0)) as u32;
        }
        last = (machine.instructions)();
    }
    text.finish(&mut machine.out)?;
    write!(machine.out, "\nids   ")?;
    ids[..prompt + TOKENS].iter().try_for_each(|id| write!(machine.out, " {id}"))?;
    writeln!(machine.out, "\nlogits {:08x}", digest.finalize())?;
    let bytes = (before - machine.memory.rest.len()) * size_of::<ActivationGroup>();
    writeln!(machine.out, "memory {bytes} bytes")?;
    if let (Some(first), Some(last)) = (first, last) {
        writeln!(machine.out, "# {} instructions per token", (last - first) / (TOKENS as u64 - 1))?;
    }
    Ok(())
}

/// Shows the ends of lines as blanks.
struct OneLine<W>(W);

impl<W: Write> Write for OneLine<&mut W> {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        s.chars().try_for_each(|c| self.0.write_char(if c.is_control() { ' ' } else { c }))
    }
}
