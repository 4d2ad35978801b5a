//! A text from a prompt, token by token, with any model: [`Generate::generate`].

use crate::{
    causal_lm::CausalLm,
    engine::FinishReason,
    llama::LlamaEosToks,
    pretrained::Pretrained,
    sampling::{Sampler, Sampling},
    tokenizer::{StopTexts, TextStream},
};
use candle_core::{Device, Result, Tensor};
use candle_sparse::Error;
use tokenizers::Tokenizer;

/// How a prompt is continued.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct GenerateOptions<'a> {
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens to write at most.
    pub max_tokens: usize,
    /// Tokens that end the text.
    pub end_tokens: Vec<u32>,
    /// Texts that end it where they are written; the tokenizer is needed for them.
    pub stop: Vec<String>,
    /// Makes text of the tokens.
    pub tokenizer: Option<&'a Tokenizer>,
}

impl Default for GenerateOptions<'_> {
    /// 256 tokens that [`Sampling::default`] chooses, without text, and without an end before.
    fn default() -> Self {
        let sampling = Sampling::default();
        Self { sampling, max_tokens: 256, end_tokens: Vec::new(), stop: Vec::new(), tokenizer: None }
    }
}

impl<'a> GenerateOptions<'a> {
    /// Sampling and end tokens of a model's files, and its tokenizer.
    #[must_use]
    pub fn of(loaded: &'a Pretrained) -> Self {
        let end_tokens = match &loaded.config.eos_token_id {
            Some(LlamaEosToks::Single(id)) => vec![*id],
            Some(LlamaEosToks::Multiple(ids)) => ids.clone(),
            None => Vec::new(),
        };
        let sampling = Sampling::of(&loaded.generation);
        Self { sampling, end_tokens, tokenizer: Some(&loaded.tokenizer), ..Self::default() }
    }

    /// The same with another [`sampling`](Self::sampling).
    #[must_use]
    pub fn with_sampling(self, sampling: Sampling) -> Self {
        Self { sampling, ..self }
    }

    /// The same with other [`max_tokens`](Self::max_tokens).
    #[must_use]
    pub fn with_max_tokens(self, max_tokens: usize) -> Self {
        Self { max_tokens, ..self }
    }

    /// The same with other [`end_tokens`](Self::end_tokens).
    #[must_use]
    pub fn with_end_tokens(self, end_tokens: Vec<u32>) -> Self {
        Self { end_tokens, ..self }
    }

    /// The same with other [`stop`](Self::stop) texts.
    #[must_use]
    pub fn with_stop(self, stop: Vec<String>) -> Self {
        Self { stop, ..self }
    }

    /// The same with another [`tokenizer`](Self::tokenizer).
    #[must_use]
    pub fn with_tokenizer(self, tokenizer: Option<&'a Tokenizer>) -> Self {
        Self { tokenizer, ..self }
    }
}

/// A token that was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// The token.
    pub id: u32,
    /// The text that it completes: empty while a character is not whole, or a stop text may be coming. What was held back comes
    /// with the last token, whose own text is left out where it is an end token or belongs to a stop text.
    pub text: String,
    /// Why it is the last one.
    pub end: Option<FinishReason>,
}

/// Texts from prompts, of every [`CausalLm`]: the models of this crate and candle's.
///
/// ```
/// use candle_sparse_models::{
///     KvConfig, KvDType,
///     causal_lm::LlamaSession,
///     generate::{Generate, GenerateOptions},
///     tokenizer::prompt_tokens,
/// };
/// # use candle_sparse_models::{files::ModelFiles, llama::LoadOptions, pretrained::Pretrained};
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
///
/// let loaded = Pretrained::load(&ModelFiles::from_folder(folder)?, LoadOptions::default())?;
/// let mut session = LlamaSession::new(&loaded.model, KvConfig::exact(KvDType::F16));
/// let prompt = prompt_tokens(&loaded.tokenizer, "Once upon a time")?;
/// for token in session.generate(&prompt, GenerateOptions::of(&loaded).with_max_tokens(20))? {
///     print!("{}", token?.text);
/// }
/// # Ok::<(), candle_core::Error>(())
/// ```
pub trait Generate: CausalLm {
    /// Continues what the model holds, and `prompt` behind it, by the tokens of the iterator.
    ///
    /// The model reads `prompt` from [`cached_len`](CausalLm::cached_len) on: [`clear`](CausalLm::clear) it, or
    /// [`truncate`](CausalLm::truncate) it to what two prompts have in common, where another text begins. When the iterator ends,
    /// or is dropped before, the model has read the prompt and every token that came but the last: a text that goes on from there
    /// begins with that one. After an error nothing more comes.
    ///
    /// # Errors
    /// [`Error::Setting`]: an empty prompt, a setting that makes no sense, or stop texts without a tokenizer. The iterator gives
    /// those of the model, a full context among them.
    fn generate<'a>(
        &'a mut self,
        prompt: &[u32],
        options: GenerateOptions<'a>,
    ) -> Result<Generation<'a, Self>> {
        let wrong = |name, problem: &str| Err(Error::Setting { name, problem: problem.into() }.into());
        if prompt.is_empty() {
            return wrong("prompt", "it is empty: give at least one token");
        }
        if !options.stop.is_empty() && options.tokenizer.is_none() {
            return wrong("stop", "stop texts need a tokenizer: set one");
        }
        Ok(Generation {
            model: self,
            unread: prompt.to_vec(),
            written: Vec::new(),
            sampler: Sampler::new(&options.sampling)?,
            stream: options.tokenizer.map(TextStream::new),
            text: StopTexts::new(options.stop),
            end_tokens: options.end_tokens,
            max_tokens: options.max_tokens,
            ended: options.max_tokens == 0,
        })
    }
}

impl<M: CausalLm + ?Sized> Generate for M {}

/// The tokens of a text as they are written, see [`Generate::generate`].
#[derive(Debug)]
pub struct Generation<'a, M: ?Sized> {
    model: &'a mut M,
    /// What the model reads next.
    unread: Vec<u32>,
    written: Vec<u32>,
    sampler: Sampler,
    stream: Option<TextStream<'a>>,
    text: StopTexts,
    end_tokens: Vec<u32>,
    max_tokens: usize,
    ended: bool,
}

impl<M: CausalLm + ?Sized> Iterator for Generation<'_, M> {
    type Item = Result<Token>;

    fn next(&mut self) -> Option<Result<Token>> {
        if self.ended {
            return None;
        }
        let token = self.token();
        self.ended = !matches!(&token, Ok(Token { end: None, .. }));
        Some(token)
    }
}

impl<M: CausalLm + ?Sized> Generation<'_, M> {
    fn token(&mut self) -> Result<Token> {
        self.model.expect(&self.sampler, &self.written, self.max_tokens - self.written.len() - 1);
        let ids = Tensor::new(self.unread.as_slice(), &Device::Cpu)?.unsqueeze(0)?;
        let logits = self.model.forward(&ids, self.model.cached_len())?.flatten_all()?.to_vec1::<f32>()?;
        let id = self.sampler.sample(&logits, &self.written)?;
        self.unread.clear();
        self.unread.push(id);
        self.written.push(id);
        let ends = self.end_tokens.contains(&id);
        let piece = self.stream.as_mut().filter(|_| !ends).map(|stream| stream.push(id)).unwrap_or_default();
        let mut text = self.text.push(&piece);
        let end = [
            (ends, FinishReason::EndToken),
            (self.text.stopped(), FinishReason::StopText),
            (self.written.len() == self.max_tokens, FinishReason::Length),
        ];
        let end = end.into_iter().find(|(ends, _)| *ends).map(|(_, reason)| reason);
        if end.is_some() {
            text += &self.text.push(&self.stream.take().map(TextStream::finish).unwrap_or_default());
            text += &std::mem::take(&mut self.text).rest();
        }
        Ok(Token { id, text, end })
    }
}
