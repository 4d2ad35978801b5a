//! Conversations that go on from messages.

use super::{Chat, ChatTemplate, Message};

impl Chat {
    /// A conversation that was held before: the model reads all of it with the next turn.
    #[must_use]
    pub fn with_messages(template: ChatTemplate, messages: Vec<Message>) -> Self {
        Self { messages, ..Self::new(template, None) }
    }
}
