"""The fields of a KubeRay RayJob, and of the Kubernetes objects inside it as far as ours uses them, as pydantic models.

The RayJob and RayCluster parts list every field of `ray-operator/apis/ray/v1/{rayjob,raycluster}_types.go` of KubeRay
(ray.io/v1, as of 1.6), from which its CustomResourceDefinition is generated; what is nested deeper than we go is a
`dict`. The pod parts hold only what we use: a field that is missing here may still be legal. Unknown fields are
refused, as `kubectl apply --validate=strict` does.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic.alias_generators import to_camel

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Quantity = Annotated[str, StringConstraints(pattern=r"^([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE])?$")]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Strings = dict[str, str]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


# ---- Kubernetes ------------------------------------------------------------------------------------------


class Metadata(Part):
    name: Name
    namespace: Name | None = None
    labels: Strings = {}
    annotations: Strings = {}


class EnvVar(Part):
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    value: str | None = None
    value_from: dict[str, Any] | None = None


class Port(Part):
    container_port: Annotated[int, Field(gt=0, lt=65536)]
    name: Annotated[str, StringConstraints(max_length=15)]


class Exec(Part):
    command: list[str]


class Hook(Part):
    exec: Exec


class Lifecycle(Part):
    post_start: Hook | None = None
    pre_stop: Hook | None = None


class Resources(Part):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity]


class Mount(Part):
    name: Name
    mount_path: Annotated[str, StringConstraints(pattern="^/")]
    read_only: bool = False


class Container(Part):
    name: Name
    image: str
    env: list[EnvVar] = []
    ports: list[Port] = []
    lifecycle: Lifecycle | None = None
    resources: Resources | None = None
    volume_mounts: list[Mount] = []


class Claim(Part):
    claim_name: Name


class Volume(Part):
    name: Name
    persistent_volume_claim: Claim


class PodSecurity(Part):
    run_as_non_root: bool
    run_as_user: Annotated[int, Field(gt=0)]
    fs_group: Annotated[int, Field(gt=0)]


class PodSpec(Part):
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume] = []
    security_context: PodSecurity | None = None
    termination_grace_period_seconds: Annotated[int, Field(ge=0)] = 30

    @model_validator(mode="after")
    def mounts_are_of_volumes(self) -> Self:
        mounted = {mount.name for container in self.containers for mount in container.volume_mounts}
        assert mounted <= {volume.name for volume in self.volumes}
        return self


class PodTemplate(Part):
    metadata: dict[str, Any] = {}
    spec: PodSpec


# ---- KubeRay ---------------------------------------------------------------------------------------------


class AuthOptions(Part):
    enable_k8s_token_auth: bool | None = Field(None, alias="enableK8sTokenAuth")
    secret_name: str | None = None
    mode: Literal["disabled", "token"] = "token"


class HeadGroup(Part):
    template: PodTemplate
    head_service: dict[str, Any] | None = None
    enable_ingress: bool | None = None
    ingress_options: dict[str, Any] | None = None
    resources: Strings = {}
    labels: Strings = {}
    ray_start_params: Strings = {}
    service_type: Literal["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"] | None = None


class WorkerGroup(Part):
    suspend: bool | None = None
    group_name: Name
    replicas: Count = 0
    min_replicas: Count
    max_replicas: Count
    idle_timeout_seconds: Count | None = None
    priority: int = 0
    resources: Strings = {}
    labels: Strings = {}
    ray_start_params: Strings = {}
    template: PodTemplate
    scale_strategy: dict[str, Any] | None = None
    num_of_hosts: Count = 1

    @model_validator(mode="after")
    def replicas_lie_between(self) -> Self:
        assert self.min_replicas <= self.replicas <= self.max_replicas
        return self


class RayClusterSpec(Part):
    upgrade_strategy: dict[str, Any] | None = None
    auth_options: AuthOptions | None = None
    suspend: bool | None = None
    managed_by: str | None = None
    autoscaler_options: dict[str, Any] | None = None
    head_service_annotations: Strings = {}
    enable_in_tree_autoscaling: bool | None = None
    gcs_fault_tolerance_options: dict[str, Any] | None = None
    history_server_options: dict[str, Any] | None = None
    network_policy: dict[str, Any] | None = None
    tls_options: dict[str, Any] | None = None
    head_group_spec: HeadGroup
    ray_version: Annotated[str, StringConstraints(pattern=r"^\d+\.\d+\.\d+$")] | None = None
    worker_group_specs: list[WorkerGroup] = []


class RayJobSpec(Part):
    active_deadline_seconds: Annotated[int, Field(gt=0)] | None = None
    backoff_limit: Count = 0
    ray_cluster_spec: RayClusterSpec | None = None
    submitter_pod_template: PodTemplate | None = None
    metadata: Strings = {}
    cluster_selector: Strings = {}
    submitter_config: dict[str, Any] | None = None
    managed_by: Literal["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"] | None = None
    deletion_strategy: dict[str, Any] | None = None
    entrypoint: str = ""
    runtime_env_yaml: str = Field("", alias="runtimeEnvYAML")
    job_id: str = ""
    submission_mode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = "K8sJobMode"
    entrypoint_resources: str = ""
    entrypoint_num_cpus: float = 0
    entrypoint_num_gpus: float = 0
    ttl_seconds_after_finished: Count = 0
    shutdown_after_job_finishes: bool = False
    suspend: bool = False

    @model_validator(mode="after")
    def a_ttl_needs_a_shutdown(self) -> Self:
        """KubeRay's controller refuses it otherwise."""
        assert self.shutdown_after_job_finishes or not self.ttl_seconds_after_finished
        assert (self.ray_cluster_spec is None) != (not self.cluster_selector)
        return self


class RayJob(Part):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec

    @model_validator(mode="after")
    def the_name_leaves_room(self) -> Self:
        """KubeRay appends to it, and names of Kubernetes have 63 characters."""
        assert re.fullmatch(r".{1,47}", self.metadata.name)
        return self
