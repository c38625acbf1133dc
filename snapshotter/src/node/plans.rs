//! What is fetched of a layer before it is read.

use std::sync::Arc;

use tokio::task::spawn_blocking;

use super::Node;
use crate::fetch::{LazyLayer, Plan};
use crate::profiles::{self, ImageId, Profiles};

/// Who says what a start will need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProfileSource {
    /// The image itself, by a landmark in the layer.
    Image,
    /// A former start on this node.
    Node,
}

impl Node {
    /// Whom to believe, in this order: who built the image meant it; what was
    /// seen on this node may be one use of the image among several.
    pub(super) async fn plan(
        &self,
        layer: &Arc<LazyLayer>,
        image: &ImageId,
    ) -> Option<(ProfileSource, Plan)> {
        if layer.dir().identity().prefetch_end.is_some() {
            return Some((ProfileSource::Image, Plan::Landmark));
        }
        let plan = self.recorded_plan(layer, image).await?;
        Some((ProfileSource::Node, plan))
    }

    /// What former starts on this node read.
    async fn recorded_plan(&self, layer: &Arc<LazyLayer>, image: &ImageId) -> Option<Plan> {
        let found = self.0.profiles.find(image)?;
        if !found.image.layers.contains(&layer.digest()) {
            return None;
        }
        let store: Arc<Profiles> = Arc::clone(&self.0.profiles);
        let layer = Arc::clone(layer);
        let digest = layer.digest();
        let order = spawn_blocking(move || {
            let profile = store.load(&found).map_err(|error| error.to_string())?;
            profiles::chunks(layer.dir(), &profile).map_err(|error| error.to_string())
        });
        match order.await {
            Ok(Ok(order)) => Some(Plan::Order(order.into())),
            Ok(Err(error)) => {
                tracing::warn!(layer = %digest, "not fetched ahead: {error}");
                None
            }
            Err(_) => None,
        }
    }
}
