//! Artifacts that refer to an image (OCI distribution 1.1), also in
//! registries that do not list them: there, an index under a tag that is made
//! of the image's digest does.

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use sluice_oci::{Descriptor, Digest, Index, Manifest, Reference, media_type};

use crate::auth::Scope;
use crate::client::{MAX_MANIFEST, about_manifest};
use crate::document::Document;
use crate::endpoint::Endpoint;
use crate::error::{Context, Error, ErrorKind};
use crate::transport::{Call, Purpose, body_up_to};
use crate::upload::Stored;
use crate::{Client, document};

/// With it, a registry says that it lists the artifact by its subject.
pub(crate) const OCI_SUBJECT: HeaderName = HeaderName::from_static("oci-subject");

impl Client {
    /// What of a type refers to the image with this digest, in the repository
    /// of `reference`. The list and the tag are asked for at once, so that
    /// this takes one round trip with either kind of registry, and nothing is
    /// sent a second time: callers can do without.
    pub async fn referrers(
        &self,
        reference: &Reference,
        subject: Digest,
        artifact_type: &str,
    ) -> Result<Vec<Descriptor>, Error> {
        let (listed, tagged) = tokio::join!(
            self.listed(reference, subject, artifact_type),
            self.tagged(reference, subject),
        );
        let mut found = match (listed?, tagged) {
            (Some(index), _) => index.manifests,
            (None, tagged) => tagged?.map_or_else(Vec::new, |index| index.manifests),
        };
        // A registry may list all there are.
        found.retain(|descriptor| has_type(descriptor, artifact_type));
        Ok(found)
    }

    /// The registry's own list, or none where it has no lists.
    async fn listed(
        &self,
        reference: &Reference,
        subject: Digest,
        artifact_type: &str,
    ) -> Result<Option<Index>, Error> {
        let context = about_manifest("list referrers of", &reference.with_digest(subject));
        let purpose = Purpose::Resolve;
        let mut round = self.transport.round(reference, purpose, None, &context)?;
        while let Some(endpoint) = round.next() {
            match self
                .listed_at(&endpoint, reference, subject, artifact_type, &context)
                .await
            {
                Ok(listed) => {
                    round.delivered(&endpoint);
                    return Ok(listed);
                }
                Err(error) => round.failed(&endpoint, error),
            }
        }
        Err(round.error(&context))
    }

    async fn listed_at(
        &self,
        endpoint: &Endpoint,
        reference: &Reference,
        subject: Digest,
        artifact_type: &str,
        context: &Context,
    ) -> Result<Option<Index>, Error> {
        let context = &endpoint.context(context);
        let mut url = endpoint.pull_url(&format!("referrers/{subject}"));
        url.query_pairs_mut()
            .append_pair("artifactType", artifact_type);
        let scope = Scope::pull(reference.repository());
        let mut call = Call::new(Method::GET, endpoint, &scope, context);
        call.headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(document::ACCEPT))]);
        let mut response = self.transport.fetch(&call, url, None).await?;
        match response.status() {
            StatusCode::OK => {}
            // Older registries answer in any of these ways.
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED | StatusCode::BAD_REQUEST => {
                return Ok(None);
            }
            _ => return Err(self.transport.refusal(context, response).await),
        }
        let content_type = response.headers().get(CONTENT_TYPE);
        let is_index = content_type
            .and_then(|value| value.to_str().ok())
            .is_some_and(media_type::is_index);
        if !is_index {
            // Something that answers every path.
            return Ok(None);
        }
        let stall = self.transport.config.stall_timeout;
        let bytes = body_up_to(&mut response, MAX_MANIFEST, stall, context).await?;
        parse_index(bytes, context).map(Some)
    }

    /// The index under the tag, or none.
    async fn tagged(&self, reference: &Reference, subject: Digest) -> Result<Option<Index>, Error> {
        let tagged = reference.with_referrers_tag(subject);
        let context = about_manifest("fetch", &tagged);
        match self.manifest_once(&tagged, &context).await {
            Ok(document) => document.index().map(Some),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Stores an artifact that refers to an image of the same repository, and
    /// has it listed. Where the registry does not do that by itself, it takes
    /// the place of what was listed before with the same type.
    pub async fn push_referrer(
        &self,
        reference: &Reference,
        artifact: &Manifest,
    ) -> Result<Digest, Error> {
        let context = about_manifest("attach an artifact to", reference);
        let wrong = |why: &str| context.protocol(why.to_owned());
        let subject: Descriptor = artifact
            .other
            .get("subject")
            .and_then(|subject| serde_json::from_value(subject.clone()).ok())
            .ok_or_else(|| wrong("the artifact names no subject"))?;
        let artifact_type = artifact
            .other
            .get("artifactType")
            .and_then(|value| value.as_str())
            .ok_or_else(|| wrong("the artifact has no type"))?;
        let bytes = serde_json::to_vec(artifact).map_err(|error| wrong(&error.to_string()))?;
        let digest = Digest::of(&bytes);
        let size = bytes.len() as u64;
        let by_digest = reference.with_digest(digest);
        let stored = self
            .store_manifest(&by_digest, media_type::OCI_MANIFEST, bytes.into())
            .await?;
        if stored == Stored::AndListed {
            return Ok(digest);
        }
        let listed = self.tagged(reference, subject.digest).await?;
        let mut index = listed.unwrap_or_else(|| Index {
            schema_version: 2,
            media_type: Some(media_type::OCI_INDEX.to_owned()),
            manifests: Vec::new(),
            annotations: Default::default(),
            other: Default::default(),
        });
        index
            .manifests
            .retain(|descriptor| !has_type(descriptor, artifact_type));
        let mut entry = Descriptor::new(media_type::OCI_MANIFEST, digest, size);
        entry.annotations.clone_from(&artifact.annotations);
        entry
            .other
            .insert("artifactType".to_owned(), artifact_type.into());
        index.manifests.push(entry);
        let bytes = serde_json::to_vec(&index).map_err(|error| wrong(&error.to_string()))?;
        let tag = reference.with_referrers_tag(subject.digest);
        self.push_manifest(&tag, media_type::OCI_INDEX, bytes.into())
            .await?;
        Ok(digest)
    }
}

fn parse_index(bytes: Bytes, context: &Context) -> Result<Index, Error> {
    Document::new(None, Digest::of(&bytes), bytes, context)?.index()
}

fn has_type(descriptor: &Descriptor, artifact_type: &str) -> bool {
    descriptor
        .other
        .get("artifactType")
        .and_then(|t| t.as_str())
        == Some(artifact_type)
}
