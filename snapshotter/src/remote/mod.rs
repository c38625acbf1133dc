//! From what containerd says of a layer to its verified TOC.

mod attached;
mod budget;
mod images;
mod toc;

use std::collections::BTreeMap;
use std::time::Duration;

use sluice_layer::annotations::AnnotationError;
use sluice_layer::{
    FooterError, LayerAnnotations, Limits, StartChunks, StartRanges, TocError, TocTrust,
};
use sluice_oci::{Descriptor, Digest, Reference};
use sluice_registry::{Client, ErrorKind};

pub use attached::AttachedProfile;
pub use budget::{Taken, TocBudget};
pub use images::{ImageLayer, Images};
pub use toc::{Arrived, FetchedToc, StoredToc, asked_for_toc};

/// Why a layer's TOC is not at hand.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The registry did not give what was asked for.
    #[error("{0}")]
    Registry(#[from] sluice_registry::Error),
    /// The image does not hold the layer.
    #[error("the manifest of {0} does not list it")]
    NotInImage(Reference),
    /// The manifest holds no root of trust for it.
    #[error(
        "the image's manifest carries no digest of a table of contents for it; convert the image \
         with 'sluice convert'"
    )]
    NoTrust,
    /// The annotations are wrong.
    #[error("{0}")]
    Annotations(#[from] AnnotationError),
    /// The blob's end does not lead to a TOC.
    #[error("{0}")]
    Footer(#[from] FooterError),
    /// The TOC is refused.
    #[error("{0}")]
    Toc(#[from] TocError),
    /// An attached profile cannot be used.
    #[error("{0}")]
    Profile(String),
    /// The registry took too long.
    #[error(
        "the registry did not deliver it within {} s",
        .0.as_secs_f32()
    )]
    Late(Duration),
    /// The registry told no size.
    #[error("the registry does not tell the blob's size")]
    NoSize,
    /// It is larger than the memory for all.
    #[error(
        "its table of contents has {needed} bytes, compressed, and at most {limit} are taken in; \
         raise toc_memory_mib in section [fetch]"
    )]
    TocMemory {
        /// Bytes.
        needed: u64,
        /// Bytes.
        limit: u64,
    },
    /// Other TOCs hold the memory.
    #[error(
        "the tables of contents of other layers have taken all memory that is set aside for them \
         for {0:?}; raise toc_memory_mib in section [fetch]"
    )]
    TocsInTheWay(Duration),
}

impl Error {
    /// Whether the TOC could be read with more memory.
    pub fn needs_more_memory(&self) -> bool {
        matches!(self, Self::Toc(error) if error.needs_more_memory())
    }
}

impl Error {
    /// Whether this is what comes of an annotation that says where the TOC is
    /// and is wrong.
    pub fn is_misplaced(&self) -> bool {
        match self {
            Self::Registry(error) => matches!(
                error.kind(),
                ErrorKind::RangeNotSatisfiable | ErrorKind::Protocol
            ),
            Self::Toc(error) => matches!(
                error,
                TocError::Digest { .. }
                    | TocError::Size { .. }
                    | TocError::Compression { .. }
                    | TocError::TooLarge { .. }
            ),
            _ => false,
        }
    }
}

/// The registry side of the node: manifests and TOCs.
pub struct Remote {
    client: Client,
    images: Images,
    limits: Limits,
    budget: TocBudget,
    patience: Duration,
}

/// What is known of a layer before any of it was fetched.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Known {
    annotations: LayerAnnotations,
    /// Size of the blob, if known.
    size: Option<u64>,
}

impl Known {
    /// Reads the annotations of the layer's descriptor.
    pub fn new(
        annotations: &BTreeMap<String, String>,
        size: Option<u64>,
    ) -> Result<Self, AnnotationError> {
        Ok(Self {
            annotations: LayerAnnotations::parse(annotations)?,
            size,
        })
    }

    /// Of a layer whose TOC was verified against `trust` before.
    pub fn trusted(trust: TocTrust) -> Self {
        Self {
            annotations: LayerAnnotations::trusting(trust),
            size: None,
        }
    }

    /// The same without anything that says where the TOC is, so that the
    /// footer is read; none if nothing says.
    pub fn without_position(&self) -> Option<Self> {
        let annotations = self.annotations.without_position();
        (annotations != self.annotations).then_some(Self {
            annotations,
            size: self.size,
        })
    }

    /// What the TOC has to match. The digest of the uncompressed TOC goes
    /// first, for it is the one that containerd's labels carry: the layer is
    /// then known by the same digest however it is asked for.
    pub fn trust(&self) -> Option<TocTrust> {
        let uncompressed = self.annotations.toc_digest().map(TocTrust::Uncompressed);
        let compressed = self.annotations.compressed_toc_digest();
        uncompressed.or(compressed.map(TocTrust::Compressed))
    }

    /// Which of the prioritized files' chunks a start reads, if the image says.
    pub fn start_chunks(&self) -> Option<&StartChunks> {
        self.annotations.start_chunks()
    }

    /// Where in the blob the first of them lie, if the image says.
    pub fn start_ranges(&self) -> Option<&StartRanges> {
        self.annotations.start_ranges()
    }

    /// Whether the image vouches for a TOC that was once verified against
    /// `trust`, and that has the digest `compressed` as the blob stores it.
    pub fn vouches_for(&self, trust: TocTrust, compressed: Digest) -> bool {
        match trust {
            TocTrust::Uncompressed(digest) if self.annotations.toc_digest() == Some(digest) => true,
            _ => self.annotations.compressed_toc_digest() == Some(compressed),
        }
    }
}

impl Remote {
    /// All requests go through `client`, and all TOCs together take no more
    /// memory than `budget`. A manifest, and a TOC, may take as long as
    /// `patience` to arrive: who asks for them can do without.
    pub fn new(client: Client, budget: TocBudget, patience: Duration) -> Self {
        Self {
            client,
            patience,
            images: Images::new(),
            limits: Limits::default(),
            budget,
        }
    }

    /// The memory for TOCs.
    pub fn budget(&self) -> &TocBudget {
        &self.budget
    }

    /// The client.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// What the image's manifest says of all its layers that could be lazy.
    /// The manifest is fetched once.
    pub async fn layers(
        &self,
        reference: &Reference,
        manifest: Option<Digest>,
        layer: Digest,
    ) -> Result<Vec<ImageLayer>, Error> {
        let layers = (self.images).layers(&self.client, reference, manifest, layer);
        self.in_time(layers).await
    }

    /// Remembers the layers of a manifest, so that it is not fetched.
    pub fn know_image(&self, reference: &Reference, manifest: Digest, layers: Vec<Descriptor>) {
        self.images.know(reference, manifest, layers);
    }

    async fn in_time<T>(&self, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        tokio::time::timeout(self.patience, work)
            .await
            .unwrap_or(Err(Error::Late(self.patience)))
    }
}
