//! What the program does, without anything of a chip but its clock and its serial line.

use candle_sparse_core::{
    ActivationGroup, KernelSet, KvCache, Scratch,
    forward::forward,
    image::{self, Image, empty_layer},
    sampler::Sampler,
    tokenizer::TextStream,
};
use core::fmt::{self, Write};
use esp_hal::time::Instant;
use esp_println::{print, println};

const PROMPT: &str = "Once upon a time";
const TOKENS: usize = 200;
/// Bytes of the prompt and what encoding needs beside it.
const ROOM: usize = 256;
/// Blocks that a model may have.
const LAYERS: usize = 12;

/// Memory that is given away from front to back.
struct Memory<'a>(&'a mut [ActivationGroup]);

impl<'a> Memory<'a> {
    fn take<T: bytemuck::Pod>(&mut self, n: usize) -> Result<&'a mut [T], image::Error> {
        let units = (n * size_of::<T>()).div_ceil(size_of::<ActivationGroup>());
        let (expected, got) = (units, self.0.len());
        let rest = core::mem::take(&mut self.0);
        let short = candle_sparse_core::Error::Length { what: "units of 256 bytes of memory", expected, got };
        let (head, tail) = rest.split_at_mut_checked(units).ok_or(short)?;
        self.0 = tail;
        Ok(&mut bytemuck::cast_slice_mut(head)[..n])
    }
}

struct Serial;

impl Write for Serial {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        print!("{s}");
        Ok(())
    }
}

/// Tells stories without end.
pub(crate) fn tell<K: KernelSet>(
    kernels: &K,
    image: &[u8],
    memory: &mut [ActivationGroup],
) -> Result<(), image::Error> {
    let image = Image::open(image)?;
    let (c, positions, tokenizer) = (image.config(), image.settings().positions, image.tokenizer()?);
    let mut layers = [empty_layer(); LAYERS];
    let (expected, got) = (c.num_hidden_layers, LAYERS);
    let model = image.model(layers.get_mut(..expected).ok_or(image::Error::Layers { expected, got })?)?;
    let (all, mut memory) = (memory.len(), Memory(memory));
    let mut cache = KvCache::new(&model, memory.take(KvCache::words(&model, positions))?)?;
    let (data, groups) =
        (memory.take(Scratch::elements(&model, positions))?, memory.take(Scratch::groups(c))?);
    let mut scratch = Scratch::new(&model, positions, data, groups)?;
    let logits: &mut [f32] = memory.take(c.vocab_size)?;
    let [ids, ranks]: [&mut [u32]; 2] = [memory.take(ROOM)?, memory.take(ROOM)?];
    println!("{} KB of image, {} KB of memory", image.len() / 1024, (all - memory.0.len()) / 4);
    let sampler = Sampler::TopP { temperature: 0.8, top_p: 0.9 };
    let mut seed = 1;
    loop {
        let n = tokenizer.encode_prompt(PROMPT, ids, ranks)?;
        let (mut stream, mut token, mut position, begin) = (TextStream::default(), ids[0], 0, Instant::now());
        while position < (n + TOKENS).min(c.max_position_embeddings) {
            token = if position < n { ids[position] } else { token };
            let _ = stream.push(&tokenizer, token, &mut Serial);
            if position >= n && tokenizer.is_end(token) {
                break;
            }
            let wanted = (position + 1 >= n).then_some(&mut *logits);
            let at = (token as usize, position);
            forward(kernels, &model, at, &mut cache, &mut scratch, wanted, &mut || false)?;
            position += 1;
            if position >= n {
                token = sampler.sample(logits, || next(&mut seed))? as u32;
            }
        }
        let micros = begin.elapsed().as_micros();
        println!("\n{position} tokens, {} tokens per 100 s", position as u64 * 100_000_000 / micros.max(1));
    }
}

/// Marsaglia's xorshift.
fn next(seed: &mut u32) -> u32 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 17;
    *seed ^= *seed << 5;
    *seed
}
