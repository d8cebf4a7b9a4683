{{/* Each helper takes (dict "root" $ "component" NAME …). */}}

{{- define "baton.name" -}}
{{ printf "%s-%s" .root.Release.Name .component | trunc 52 | trimSuffix "-" }}
{{- end }}

{{/* What selects the pods of a component. */}}
{{- define "baton.selector" -}}
app.kubernetes.io/name: baton
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end }}

{{- define "baton.labels" -}}
{{ include "baton.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "baton.image" -}}
{{- $own := .own | default dict }}
{{- $own.repository | default .root.Values.image.repository }}:{{ $own.tag | default .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- define "baton.etcd" -}}
{{- if .Values.etcd.enabled -}}
http://{{ .Release.Name }}-etcd-client:2379
{{- else -}}
{{ required "etcd.urls is empty: give the URLs of an etcd, or set etcd.enabled to true" (join "," .Values.etcd.urls) }}
{{- end }}
{{- end }}

{{/* All addresses of a pod, to listen on; and the one that others call it by. */}}
{{- define "baton.any" -}}
{{ ternary "[::]" "0.0.0.0" .Values.ipv6 }}
{{- end }}

{{- define "baton.host" -}}
{{ ternary "[$(POD_IP)]" "$(POD_IP)" .Values.ipv6 }}
{{- end }}

{{/* What every program of the cluster is told. */}}
{{- define "baton.clusterArgs" -}}
- --etcd={{ include "baton.etcd" . }}
{{- if ne .Values.cluster "default" }}
- --cluster={{ .Values.cluster }}
{{- end }}
{{- end }}

{{- define "baton.env" -}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
{{- if .Values.clusterTlsSecret }}
- {name: BATON_CLUSTER_TLS_CA, value: /cluster-tls/ca.crt}
- {name: BATON_CLUSTER_TLS_CERT, value: /cluster-tls/tls.crt}
- {name: BATON_CLUSTER_TLS_KEY, value: /cluster-tls/tls.key}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "baton.volumeMounts" -}}
{{- if .Values.clusterTlsSecret }}
- {name: cluster-tls, mountPath: /cluster-tls, readOnly: true}
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "baton.volumes" -}}
{{- with .Values.clusterTlsSecret }}
- name: cluster-tls
  secret: {secretName: {{ . }}}
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Probes of a gRPC server: `port`, `service`. The kubelet speaks no TLS with it; by TCP alone too,
nobody listens before it serves. */}}
{{- define "baton.ready" -}}
{{- if .root.Values.clusterTlsSecret -}}
tcpSocket: {port: {{ .port }}}
{{- else -}}
grpc: {port: {{ .port }}, service: {{ .service }}}
{{- end }}
{{- end }}

{{- define "baton.live" -}}
{{- if .root.Values.clusterTlsSecret -}}
tcpSocket: {port: {{ .port }}}
{{- else -}}
grpc: {port: {{ .port }}}
{{- end }}
{{- end }}

{{- define "baton.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "baton.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Where pods go: `place` has nodeSelector, tolerations and affinity; `spread` what to do when pods
cannot be spread over nodes. */}}
{{- define "baton.placement" -}}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .place.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .place.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .place.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: {{ .spread | default "ScheduleAnyway" }}
    labelSelector:
      matchLabels:
        {{- include "baton.selector" . | nindent 8 }}
  {{- if .root.Values.zones }}
  - maxSkew: 1
    topologyKey: topology.kubernetes.io/zone
    whenUnsatisfiable: ScheduleAnyway
    # Of the pods of the same StatefulSet or Deployment.
    matchLabelKeys: [app.kubernetes.io/component]
    labelSelector:
      matchLabels:
        {{- include "baton.selector" (dict "root" .root) | nindent 8 }}
  {{- end }}
{{- end }}
