"""Chat templates in the styles that model families use, written for these tests."""

CHATML = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

HEADERS = """\
{% set ns = namespace(system='You are helpful.', rest=messages) %}
{% if messages[0].role == 'system' %}
    {% set ns.system = messages[0].content %}
    {% set ns.rest = messages[1:] %}
{% endif %}
{{- bos_token }}<|header|>system<|/header|>

Today is {{ strftime_now('%Y') | length }} digits long. {{ ns.system }}<|eot|>
{%- for message in ns.rest %}
<|header|>{{ message.role }}<|/header|>

{{ message.content | trim }}<|eot|>
{%- endfor %}
{% if add_generation_prompt %}
<|header|>assistant<|/header|>

{% endif %}
"""

INSTRUCT = """\
{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate user/assistant/user/...') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}
{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}
{% else %}
{% continue %}
{% endif %}
{% endfor %}
"""

TURNS_WITH_JSON = """\
{%- macro turn(message, last) -%}
<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}
{{ {'text': message.content, 'last': last} | tojson }}
{{ [message.content] | tojson(indent=2) }}<end_of_turn>
{% endmacro -%}
{{ bos_token }}
{%- for message in messages -%}
{%- if loop.index > 3 %}{% break %}{% endif -%}
{{ turn(message, loop.last) }}
{%- endfor -%}
{%- if add_generation_prompt and enable_thinking is defined and not enable_thinking -%}
<no_thinking>
{%- endif -%}
{%- if add_generation_prompt -%}<start_of_turn>model{{ '\n' }}{%- endif -%}
"""

ALL = {"chatml": CHATML, "headers": HEADERS, "instruct": INSTRUCT, "turns_with_json": TURNS_WITH_JSON}

HERMES = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' }}{{- tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools>\\nAnswer with <tool_call></tool_call> tags:\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}' }}
    {{- '\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.function.name }}{{- '", "arguments": ' }}
            {{- tool_call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

LLAMA_JSON = """\
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{{- bos_token }}
{%- if tools is not none %}
    {{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.\\n\\n' }}
    {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|header|>assistant\\n{"name": "' + tool_call.name + '", "parameters": ' }}{{- tool_call.arguments | tojson }}{{- '}<|eot|>' }}
    {%- elif message.role == 'tool' %}
        {{- '<|header|>ipython\\n' }}{{- {'output': message.content} | tojson }}{{- '<|eot|>' }}
    {%- else %}
        {{- '<|header|>' + message.role + '\\n' + message.content | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
"""

MISTRAL = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools and loop.last %}[AVAILABLE_TOOLS]{{ tools | map(attribute='function') | list | tojson }}[/AVAILABLE_TOOLS]{%- endif %}
        {{- '[INST] ' + message.content + '[/INST]' }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- '[TOOL_CALLS] [' }}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.id | length != 9 %}{{- raise_exception('ids have nine characters') }}{%- endif %}
            {{- tool_call.function | tojson }}{{- ', ' if not loop.last else ']' + eos_token }}
        {%- endfor %}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}
"""

WITH_TOOLS = {"hermes": HERMES, "llama3_json": LLAMA_JSON, "mistral": MISTRAL}
