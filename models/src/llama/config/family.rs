//! Which of the models of a Llama's shape a `config.json` is of.

use super::activation;
use candle_sparse_core::Activation;

/// What differs between models that share the shape of a Llama.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Family {
    Llama,
    Mistral,
    /// AFM-4.5B: no gate.
    Arcee,
    /// Bamboo and TurboSparse-Mistral: Mistral with the activation on gate and up.
    Bamboo,
}

impl Family {
    pub(super) fn of(model_type: Option<&str>, architectures: Option<&[String]>) -> Result<Self, String> {
        match model_type {
            // ProSparse calls its Llama with `fatrelu` so.
            Some("llama" | "llama_shifted_relu" | "sparsellama") => Ok(Self::Llama),
            Some("mistral") => Ok(Self::Mistral),
            Some("arcee") => Ok(Self::Arcee),
            Some("bamboo") => Ok(Self::Bamboo),
            Some(other) => Err(format!(
                "model_type '{other}' is not supported here, only llama, llama_shifted_relu, sparsellama, mistral, arcee, bamboo"
            )),
            // A file that does not say its type may say its class: MiniCPM's runs with factors that a Llama has not.
            None => match architectures.and_then(|all| all.first()).map(String::as_str) {
                None | Some("LlamaForCausalLM" | "SparseLlamaForCausalLM") => Ok(Self::Llama),
                Some(other) => Err(format!(
                    "config.json has no model_type, and its architecture '{other}' is not LlamaForCausalLM: take the model in \
                     Llama format, or write the model_type it has"
                )),
            },
        }
    }

    pub(super) fn has_window(self) -> bool {
        matches!(self, Self::Mistral | Self::Bamboo)
    }

    pub(super) fn activation(self, name: Option<&str>, param: Option<f32>) -> Result<Activation, String> {
        match (self, name) {
            (Self::Bamboo, Some("relu" | "drelu")) => Ok(Activation::DRelu),
            (Self::Bamboo, other) => Err(format!(
                "bamboo with hidden_act '{}' is not supported, only relu, which it takes of gate and up",
                other.unwrap_or("silu")
            )),
            (Self::Arcee, name) => activation(name.unwrap_or("relu2"), param),
            (_, name) => activation(name.unwrap_or("silu"), param),
        }
    }
}
