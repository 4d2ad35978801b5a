//! Models with random weights that hold their own memory.

use candle_sparse_core::{
    Activation, Config, Error, Format, KvCache, KvConfig, Matrix, Model, Rope, RopeScaling, Scalar, Scratch,
    attention::AttentionConfig,
    ffn::{FfnPlan, Learned, PANEL, Predictor, Rule, SparseFfn},
    format::ActivationGroup,
    forward::forward,
    kernel::fast_grnn::{Cell, Salience},
    weights::{AttentionGate, DenseFfn, Ffn, GateMatrix, LayerWeights, Projection, Weights},
};

/// xorshift64*
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }

    pub(crate) fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }

    /// −1 to 1.
    fn number(&mut self) -> f32 {
        self.below(1 << 24) as f32 / (1 << 23) as f32 - 1.0
    }

    pub(crate) fn numbers(&mut self, n: usize, size: f32) -> Vec<f32> {
        (0..n).map(|_| self.number() * size).collect()
    }
}

/// A matrix in any format.
pub(crate) struct Tensor {
    rows: usize,
    cols: usize,
    format: Format,
    words: Vec<u32>,
}

impl Tensor {
    pub(crate) fn new(rows: usize, cols: usize, format: Format, x: &[f32]) -> Self {
        let bytes = format.row_bytes(cols) * rows;
        let mut words = vec![0; bytes.div_ceil(4)];
        format.quantize(x, &mut bytemuck::cast_slice_mut(&mut words)[..bytes]);
        Self { rows, cols, format, words }
    }

    fn random(r: &mut Random, rows: usize, cols: usize, format: Format) -> Self {
        let x = r.numbers(rows * cols, 1.7 / (cols as f32).sqrt());
        Self::new(rows, cols, format, &x)
    }

    pub(crate) fn matrix(&self) -> Matrix<'_> {
        let bytes = self.format.row_bytes(self.cols) * self.rows;
        let words: &[u8] = bytemuck::cast_slice(&self.words);
        Matrix::from_bytes(self.rows, self.cols, self.format, &words[..bytes]).unwrap()
    }
}

/// A projection and its bias.
pub(crate) struct Linear(pub(crate) Tensor, pub(crate) Option<Vec<f32>>);

impl Linear {
    fn view(&self) -> Projection<'_> {
        Projection { weight: self.0.matrix(), bias: self.1.as_deref() }
    }
}

/// What a sparse block holds.
pub(crate) struct Sparse {
    pub(crate) gate: Tensor,
    pub(crate) up_down: Tensor,
    pub(crate) p: Tensor,
    pub(crate) q_gate: Tensor,
    pub(crate) q_up: Tensor,
    /// Deviation, variance of up, square of up, importance², candidate, keep.
    pub(crate) vectors: [Vec<f32>; 6],
    pub(crate) bias: Vec<f32>,
    pub(crate) rule: Option<Rule>,
    pub(crate) top: Option<usize>,
    pub(crate) hot: usize,
}

pub(crate) enum FfnOf {
    Dense(Box<[Linear; 3]>),
    Sparse(Box<Sparse>),
}

pub(crate) struct Layer {
    pub(crate) norms: [Vec<f32>; 2],
    /// q, k, v, o
    pub(crate) attention: [Linear; 4],
    /// Ridge, its bias, its threshold.
    pub(crate) gate: [Vec<f32>; 3],
    /// w1, w2, u1, u2, `b_z`, `b_h`, readout of a cell with 4 elements.
    pub(crate) cell: Option<[Vec<f32>; 7]>,
    /// `[kv_heads]`
    pub(crate) recall_shares: Option<Vec<f32>>,
    pub(crate) ffn: FfnOf,
}

/// A whole model.
pub(crate) struct Built {
    pub(crate) config: Config,
    pub(crate) embed: Tensor,
    pub(crate) head: Tensor,
    pub(crate) norm: Vec<f32>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) attention: AttentionConfig,
    pub(crate) kv: KvConfig,
}

/// What a random model is to be.
#[derive(Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) format: Format,
    pub(crate) rule: Option<Rule>,
    pub(crate) top: bool,
    pub(crate) neuron_major: bool,
    pub(crate) cell: bool,
}

pub(crate) const CELL: usize = 4;

/// Pairs of every kind: kept, on the line, stretched.
pub(crate) const YARN: RopeScaling = RopeScaling::Yarn {
    factor: 4.0,
    beta_fast: 8.0,
    beta_slow: 1.0,
    original_max_position_embeddings: 128,
    attention_factor: 1.14,
    truncate: false,
};

pub(crate) fn config(r: &mut Random, limit: usize) -> Config {
    let (kv_heads, group) = (r.of(&[1, 2, 4]), r.of(&[1, 2, 3]));
    Config {
        hidden_size: r.of(&[32, 64, 160]),
        intermediate_size: r.of(&[32, 96, 160, 288]),
        vocab_size: 40,
        num_hidden_layers: r.of(&[1, 2, 3]),
        num_attention_heads: kv_heads * group,
        num_key_value_heads: kv_heads,
        head_dim: r.of(&[8, 16, 32]),
        rms_norm_eps: 1e-5,
        rope: Rope { theta: 1e4, scaling: RopeScaling::None, interleaved: r.below(2) == 1 },
        max_position_embeddings: limit,
        hidden_act: r.of(&[
            Activation::Silu,
            Activation::Relu,
            Activation::GeluPytorchTanh,
            Activation::FatRelu { threshold: 0.1 },
        ]),
        gated_mlp: true,
        gate_shift: r.of(&[0.0, 0.1]),
        norm_shift: r.of(&[None, None, Some(0.05)]),
        sliding_window: None,
    }
}

impl Built {
    pub(crate) fn new(
        r: &mut Random,
        config: Config,
        wanted: Wanted,
        attention: AttentionConfig,
        kv: KvConfig,
    ) -> Self {
        let c = &config;
        let linear = |r: &mut Random, rows, cols: usize| {
            // Rows that are no whole blocks stay floats.
            let format =
                if cols.is_multiple_of(wanted.format.block_len()) { wanted.format } else { Format::F32 };
            let bias = (r.below(2) == 1).then(|| r.numbers(rows, 0.2));
            Linear(Tensor::random(r, rows, cols, format), bias)
        };
        let (h, inner) = (c.hidden_size, c.intermediate_size);
        let norm = |r: &mut Random| r.numbers(h, 0.3).iter().map(|v| v + 1.0).collect::<Vec<_>>();
        let layers = (0..c.num_hidden_layers)
            .map(|i| Layer {
                norms: [norm(r), norm(r)],
                attention: [
                    linear(r, c.q_dim(), h),
                    linear(r, c.kv_dim(), h),
                    linear(r, c.kv_dim(), h),
                    linear(r, h, c.q_dim()),
                ],
                gate: [
                    r.numbers(c.num_key_value_heads * h, 0.3),
                    r.numbers(c.num_key_value_heads, 0.1),
                    r.numbers(c.num_key_value_heads, 0.1).iter().map(|v| v + 1.0).collect(),
                ],
                cell: wanted.cell.then(|| {
                    let sizes =
                        [CELL * 2, 2 * h, CELL * 2, 2 * CELL, CELL, CELL, c.num_key_value_heads * CELL];
                    sizes.map(|n| r.numbers(n, 0.5))
                }),
                // The first block has none.
                recall_shares: (i > 0)
                    .then(|| [2.0, 0.0, 0.5, 1.5].into_iter().cycle().take(c.num_key_value_heads).collect()),
                ffn: if wanted.neuron_major {
                    FfnOf::Sparse(Box::new(sparse(r, c, wanted)))
                } else {
                    FfnOf::Dense(Box::new([linear(r, inner, h), linear(r, inner, h), linear(r, h, inner)]))
                },
            })
            .collect();
        let embed = Tensor::random(r, c.vocab_size, h, wanted.format);
        let head = Tensor::random(r, c.vocab_size, h, wanted.format);
        Self { config, embed, head, norm: norm(r), layers, attention, kv }
    }

    /// Calls `f` with the model in the crate's form.
    pub(crate) fn with_model<T>(&self, f: impl FnOnce(&Model<'_>) -> T) -> T {
        let layers: Vec<_> = self.layers.iter().map(|l| l.view(&self.config)).collect();
        let weights = Weights {
            embed_tokens: self.embed.matrix(),
            layers: &layers,
            norm: &self.norm,
            lm_head: self.head.matrix(),
        };
        f(&Model::with_settings(self.config, weights, self.attention, self.kv).unwrap())
    }

    /// Calls `f` with a function that takes a step, and with the cache's number of visible positions.
    pub(crate) fn run<T>(&self, words: Option<usize>, f: impl FnOnce(&mut Steps<'_>, usize) -> T) -> T {
        self.with_model(|model| {
            let limit = self.config.max_position_embeddings;
            // Whatever the memory held before.
            let mut memory = vec![0xffff_ffff; words.unwrap_or_else(|| KvCache::words(model, limit))];
            let mut cache = KvCache::new(model, &mut memory).unwrap();
            let mut data = vec![f32::NAN; Scratch::elements(model, limit)];
            let mut groups = vec![ActivationGroup::ZERO; Scratch::groups(&self.config)];
            let mut scratch = Scratch::new(model, limit, &mut data, &mut groups).unwrap();
            let visible = cache.visible();
            let mut step = |token, position, has_passed: &mut dyn FnMut() -> bool| {
                let mut logits = vec![f32::NAN; self.config.vocab_size];
                let at = (token, position);
                forward(&Scalar, model, at, &mut cache, &mut scratch, Some(&mut logits), has_passed)
                    .map(|()| (logits, (0..self.layers.len()).map(|l| scratch.run(l).active).collect()))
            };
            f(&mut step, visible)
        })
    }
}

/// Takes a token at a position: its logits, and the active neurons of each block.
pub(crate) type Steps<'a> =
    dyn FnMut(usize, usize, &mut dyn FnMut() -> bool) -> Result<(Vec<f32>, Vec<u32>), Error> + 'a;

fn sparse(r: &mut Random, c: &Config, wanted: Wanted) -> Sparse {
    let (h, inner, rank) = (c.hidden_size, c.intermediate_size, 8);
    let format = wanted.format;
    let panels = inner.div_ceil(PANEL) * rank;
    let positive =
        |r: &mut Random, size: f32| r.numbers(inner, size).iter().map(|v| v.abs()).collect::<Vec<_>>();
    Sparse {
        gate: Tensor::random(r, inner, h, format),
        up_down: Tensor::random(r, if c.gated_mlp { 2 * inner } else { inner }, h, format),
        p: Tensor::random(r, rank, h, format),
        q_gate: Tensor::new(panels, PANEL, Format::F32, &r.numbers(panels * PANEL, 0.4)),
        q_up: Tensor::new(panels, PANEL, Format::F32, &r.numbers(panels * PANEL, 0.4)),
        vectors: [0.3, 0.1, 1.0, 1.0, 0.3, 0.3].map(|size| positive(r, size)),
        bias: if wanted.rule == Some(Rule::ExactZero) { Vec::new() } else { r.numbers(h, 0.1) },
        rule: wanted.rule,
        top: wanted.top.then(|| 1 + r.below(inner)),
        hot: if wanted.top || wanted.rule == Some(Rule::ExactZero) {
            0
        } else {
            r.of(&[0, 5, 131]).min(inner)
        },
    }
}

impl Layer {
    fn view(&self, c: &Config) -> LayerWeights<'_> {
        let [q_proj, k_proj, v_proj, o_proj] = self.attention.each_ref().map(Linear::view);
        let ffn = match &self.ffn {
            FfnOf::Dense(all) => {
                let [gate_proj, up_proj, down_proj] = all.each_ref().map(Linear::view);
                Ffn::Dense(DenseFfn { gate_proj: c.gated_mlp.then_some(gate_proj), up_proj, down_proj })
            }
            FfnOf::Sparse(s) => s.view(),
        };
        LayerWeights {
            input_layernorm: &self.norms[0],
            q_proj,
            k_proj,
            v_proj,
            o_proj,
            post_attention_layernorm: &self.norms[1],
            gate: Some(self.gate(c)),
            recall_shares: self.recall_shares.as_deref(),
            ffn,
        }
    }

    pub(crate) fn gate(&self, c: &Config) -> AttentionGate<'_> {
        let matrix = |x, rows| {
            let x: &Vec<f32> = x;
            GateMatrix::Float(Matrix::new(rows, x.len() / rows, candle_sparse_core::Rows::F32(x)).unwrap())
        };
        let heads = c.num_key_value_heads;
        let [ridge, bias, threshold] = &self.gate;
        let cell = self.cell.as_ref().map(|[w1, w2, u1, u2, b_z, b_h, _]| Cell::FastGrnn {
            w1: matrix(w1, CELL),
            w2: matrix(w2, 2),
            u1: matrix(u1, CELL),
            u2: matrix(u2, 2),
            b_z: &b_z[..],
            b_h: &b_h[..],
            zeta: 0.9,
            nu: 0.1,
        });
        let readout = self.cell.as_ref().map(|c| matrix(&c[6], heads));
        Salience { ridge: matrix(ridge, heads), bias, threshold, cell, readout }
    }
}

impl Sparse {
    fn view(&self) -> Ffn<'_> {
        let [gate_deviation, up_variance, up_square, importance_squared, candidate, keep] =
            self.vectors.each_ref().map(|v| &v[..]);
        let (p, q_gate, q_up) = (self.p.matrix(), self.q_gate.matrix(), self.q_up.matrix());
        let ffn = SparseFfn {
            gate: self.gate.matrix(),
            up_down: self.up_down.matrix(),
            predictor: Some(Predictor { p, q_gate, q_up }),
            learned: Learned { gate_deviation, up_variance, up_square, importance_squared },
        };
        let plan = self.rule.map(|rule| FfnPlan {
            rule,
            top: self.top,
            hot: self.hot,
            candidate,
            keep,
            bias: &self.bias,
        });
        Ffn::Sparse(ffn, plan)
    }
}
