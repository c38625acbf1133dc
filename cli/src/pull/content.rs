//! Writing to containerd's content store.

use anyhow::{Context as _, bail};
use bytes::Bytes;
use containerd_client::services::v1::{
    AbortRequest, WriteAction, WriteContentRequest, WriteContentResponse,
};
use sluice_oci::{Descriptor, Digest};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::node::{Labels, Node, unique};

/// containerd accepts messages of up to 16 MiB.
const PIECE: usize = 1 << 20;

/// Content that is being written. What is not committed stays invisible.
pub(crate) struct Writer<'a> {
    node: &'a Node,
    digest: Digest,
    size: i64,
    name: String,
    requests: mpsc::Sender<WriteContentRequest>,
    answers: Streaming<WriteContentResponse>,
    offset: i64,
}

impl Node {
    /// Starts to write content, unless the store has it. Either way the
    /// lease holds it.
    pub(crate) async fn writer(&self, content: &Descriptor) -> anyhow::Result<Option<Writer<'_>>> {
        let digest = content.digest;
        let size = i64::try_from(content.size).with_context(|| format!("{digest} is too large"))?;
        let name = unique(&format!("sluice-pull-{}", digest.hex()));
        let (requests, receiver) = mpsc::channel(1);
        let first = WriteContentRequest {
            action: WriteAction::Stat.into(),
            r#ref: name.clone(),
            total: size,
            expected: digest.to_string(),
            ..WriteContentRequest::default()
        };
        // containerd answers the call only after its first message.
        requests.send(first).await?;
        let request = self.request(ReceiverStream::new(receiver));
        let opened = async {
            let mut answers = self.client().content().write(request).await?.into_inner();
            answers.message().await?;
            Ok::<_, Status>(answers)
        };
        match opened.await {
            Ok(answers) => Ok(Some(Writer {
                node: self,
                digest,
                size,
                name,
                requests,
                answers,
                offset: 0,
            })),
            Err(status) if status.code() == Code::AlreadyExists => Ok(None),
            Err(status) => Err(self.failed(&format!("store {digest}"), &status)),
        }
    }

    /// Stores bytes whose digest is known to be right.
    pub(crate) async fn store(
        &self,
        content: &Descriptor,
        bytes: Bytes,
        labels: Labels,
    ) -> anyhow::Result<()> {
        match self.writer(content).await? {
            None => self.label(content.digest, labels).await,
            Some(mut writer) => {
                let written = writer.write(bytes).await;
                writer.end(written, labels).await
            }
        }
    }
}

impl Writer<'_> {
    /// Adds bytes.
    pub(crate) async fn write(&mut self, mut bytes: Bytes) -> anyhow::Result<()> {
        while !bytes.is_empty() {
            let data = bytes.split_to(bytes.len().min(PIECE));
            let request = WriteContentRequest {
                action: WriteAction::Write.into(),
                offset: self.offset,
                data: data.to_vec(),
                ..WriteContentRequest::default()
            };
            self.exchange(request).await?;
        }
        Ok(())
    }

    /// Commits the content if it was `written`, or throws it away.
    pub(crate) async fn end(
        mut self,
        written: anyhow::Result<()>,
        labels: Labels,
    ) -> anyhow::Result<()> {
        let done = match written {
            Ok(()) => self.commit(labels.clone()).await,
            Err(error) => Err(error),
        };
        match done {
            // Somebody else stored the same meanwhile.
            Ok(false) => self.node.label(self.digest, labels).await,
            Ok(true) => Ok(()),
            Err(error) => {
                let Self {
                    node,
                    name,
                    requests,
                    answers,
                    ..
                } = self;
                // The stream holds a lock on the name.
                drop((requests, answers));
                let abort = AbortRequest { r#ref: name };
                let _ = node.client().content().abort(node.request(abort)).await;
                Err(error)
            }
        }
    }

    async fn commit(&mut self, labels: Labels) -> anyhow::Result<bool> {
        let request = WriteContentRequest {
            action: WriteAction::Commit.into(),
            offset: self.offset,
            total: self.size,
            expected: self.digest.to_string(),
            labels,
            ..WriteContentRequest::default()
        };
        self.exchange(request).await
    }

    /// One request and its answer; false if the content exists by now.
    async fn exchange(&mut self, request: WriteContentRequest) -> anyhow::Result<bool> {
        // If containerd ended the stream, its last message says why.
        let _ = self.requests.send(request).await;
        match self.answers.message().await {
            Ok(Some(answer)) => {
                self.offset = answer.offset;
                Ok(true)
            }
            Ok(None) => bail!("containerd ended the writing of {}", self.digest),
            Err(status) if status.code() == Code::AlreadyExists => Ok(false),
            Err(status) => Err(self.node.failed(&format!("store {}", self.digest), &status)),
        }
    }
}
