//! Runs an image of `export-embedded` on a desktop, with exactly the code of a microcontroller.
//!
//! ```sh
//! cargo run --release -p candle-sparse-core --example host -- IMAGE "Once upon a time" [TOKENS [TEMPERATURE [TOP_P]]]
//! ```
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program")]

use candle_sparse_core::{
    ActivationGroup, KvCache, Model, Scalar, Scratch,
    forward::forward,
    image::{Image, empty_layer},
    sampler::Sampler,
    tokenizer::{TextStream, Tokenizer},
};
use std::{
    env,
    error::Error,
    fs,
    hash::{BuildHasher, RandomState},
    io::{Write, stdout},
    process::ExitCode,
    time::Instant,
};

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let result = match args.as_slice() {
        [image, prompt, rest @ ..] if rest.len() <= 3 => run(image, prompt, rest),
        _ => Err("usage: host IMAGE PROMPT [TOKENS [TEMPERATURE [TOP_P]]]".into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("host: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(path: &str, prompt: &str, rest: &[String]) -> Result<(), Box<dyn Error>> {
    let tokens = rest.first().map_or(Ok(200), |n| n.parse())?;
    let sampler = sampler(rest.get(1), rest.get(2))?;
    let words = read(path)?;
    let image = Image::open(bytemuck::cast_slice(&words))?;
    let mut layers = vec![empty_layer(); image.config().num_hidden_layers];
    let model = image.model(&mut layers)?;
    let positions = image.settings().positions;
    let mut kv = vec![0; KvCache::words(&model, positions)];
    let mut data = vec![0.0; Scratch::elements(&model, positions)];
    let mut groups = vec![ActivationGroup::ZERO; Scratch::groups(model.config())];
    let bytes = 4 * (kv.len() + data.len()) + size_of_val(groups.as_slice()) + 4 * model.config().vocab_size;
    eprintln!("{} bytes of image, {bytes} bytes of memory for {positions} positions", image.len());
    let cache = KvCache::new(&model, &mut kv)?;
    let scratch = Scratch::new(&model, positions, &mut data, &mut groups)?;
    Talk { model, tokenizer: image.tokenizer()?, cache, scratch }.generate(prompt, tokens, sampler)
}

/// A file in words of 16 bytes, which is how an image must lie in memory.
fn read(path: &str) -> Result<Vec<u128>, Box<dyn Error>> {
    let bytes = fs::read(path).map_err(|e| format!("{path}: {e}"))?;
    let mut words = vec![0_u128; bytes.len().div_ceil(size_of::<u128>())];
    bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(&bytes);
    Ok(words)
}

fn sampler(temperature: Option<&String>, top_p: Option<&String>) -> Result<Sampler, Box<dyn Error>> {
    let temperature: f32 = temperature.map_or(Ok(0.0), |t| t.parse())?;
    Ok(match top_p {
        _ if temperature == 0.0 => Sampler::Greedy,
        None => Sampler::Temperature { temperature },
        Some(p) => Sampler::TopP { temperature, top_p: p.parse()? },
    })
}

struct Talk<'a> {
    model: Model<'a>,
    tokenizer: Tokenizer<'a>,
    cache: KvCache<'a>,
    scratch: Scratch<'a>,
}

impl Talk<'_> {
    fn generate(mut self, prompt: &str, tokens: usize, sampler: Sampler) -> Result<(), Box<dyn Error>> {
        let room = 4 * prompt.len() + 16;
        let (mut ids, mut ranks) = (vec![0; room], vec![0; room]);
        let n = self.tokenizer.encode_prompt(prompt, &mut ids, &mut ranks)?;
        let mut logits = vec![0.0; self.model.config().vocab_size];
        let (mut stream, begin) = (TextStream::default(), Instant::now());
        let (mut position, mut token) = (0, 0);
        while position < n + tokens {
            token = if position < n { ids[position] } else { token };
            self.say(&mut stream, token)?;
            if position >= n && self.tokenizer.is_end(token) {
                break;
            }
            // Of a prompt the last token's logits alone are wanted.
            let wanted = (position + 1 >= n).then_some(logits.as_mut_slice());
            let at = (token as usize, position);
            forward(&Scalar, &self.model, at, &mut self.cache, &mut self.scratch, wanted, &mut || false)?;
            position += 1;
            if position >= n {
                // A hasher with keys of its own per process is all the chance that is needed here.
                let random = || RandomState::new().hash_one(position) as u32;
                token = sampler.sample(&mut logits, random)? as u32;
            }
        }
        println!();
        let seconds = begin.elapsed().as_secs_f64();
        eprintln!("{position} tokens in {seconds:.2} s, {:.1} tokens per second", position as f64 / seconds);
        Ok(())
    }

    fn say(&self, stream: &mut TextStream, token: u32) -> Result<(), Box<dyn Error>> {
        let mut text = String::new();
        stream.push(&self.tokenizer, token, &mut text)?;
        print!("{text}");
        Ok(stdout().flush()?)
    }
}
